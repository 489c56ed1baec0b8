"""Models: the only module that imports open_clip. Builds, encodes, saves and loads them."""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from open_clip.modified_resnet import Bottleneck
from open_clip.transformer import ResidualAttentionBlock
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional

import benchmark.train.small_convnet  # noqa: F401 (registers the tower with timm)
from benchmark.data.images import Images
from benchmark.data.tokens import Tokenizer
from benchmark.errors import BenchError, unknown
from benchmark.seeding import stream_key
from benchmark.settings import ModelSettings, TrainSettings, digest
from benchmark.stages import write_atomically
from benchmark.train.embedding import ActiveEmbedding

Colour = tuple[float, float, float]
MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
STD: Colour = (0.26862954, 0.26130258, 0.27577711)
RESIDUAL_BLOCKS = (Bottleneck, ResidualAttentionBlock)

SMALL: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"timm_model_name": "bench_small_convnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 1},
}


passes: Counter[str] = Counter()
"""Images and texts that went through a tower in this process: `image_backward`, `image_forward`, `text_backward`, `text_forward`.

`backward` are those whose features a gradient can follow.
"""


@dataclass
class Model:
    """A CLIP model with what is needed to feed it.

    Attributes:
        net: an `open_clip.CLIP`.
        side: image side in pixels.
        precision: `fp32`, or `bf16` for autocast in both towers.
        mean, std: of the colours in [0, 1]; images are normalised with them.
        name: of the architecture.
        config: its open_clip configuration.
    """

    net: nn.Module
    tokenizer: Tokenizer
    side: int
    device: torch.device
    precision: str = "fp32"
    mean: Colour = MEAN
    std: Colour = STD
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> Tensor:
        """exp(logit_scale), the inverse temperature."""
        return self.net.get_parameter("logit_scale").exp()

    @property
    def width(self) -> int:
        """Length of a feature."""
        return int(self.net.get_parameter("text_projection").shape[1])

    def image(self, images: Tensor) -> Tensor:
        """Unit-length features (b, d) of images in [0, 1], (b, 3, S, S)."""
        return functional.normalize(self.raw_image(images), dim=-1)

    def raw_image(self, images: Tensor) -> Tensor:
        """Features (b, d) of images in [0, 1], (b, 3, S, S), as the tower gives them: not unit-length."""
        mean, std = _statistics(self.device, self.mean, self.std)
        normalised = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features: Tensor = self.net.get_submodule("visual")(normalised)
        _count("image", features)
        return features.float()

    def text(self, tokens: Tensor) -> Tensor:
        """Unit-length features (b, d) of tokens (b, L), L up to the context length.

        Padding behind the end token cannot be seen through the causal mask, so it is not computed.
        """
        return functional.normalize(self.raw_text(tokens), dim=-1)

    def raw_text(self, tokens: Tensor) -> Tensor:
        """Features (b, d) of tokens (b, L) as the tower gives them: not unit-length."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = _text_features(self.net, tokens)
        _count("text", features)
        return features.float()

    @torch.no_grad()
    def encode_images(self, images: Images, batch_size: int = 256, view: Callable[[Tensor], Tensor] | None = None, raw: bool = False) -> Tensor:
        """Features float32 (n, d) on the CPU, of uint8 images (n, S, S, 3), in eval mode; of a `view` of them in [0, 1], if given; unit-length unless `raw`."""
        encode = self.raw_image if raw else self.image
        was_training = self.net.training
        self.net.eval()
        parts = []
        for begin in range(0, len(images), batch_size):
            batch = torch.from_numpy(np.array(images[begin : begin + batch_size]))
            shown = batch.to(self.device).permute(0, 3, 1, 2).float() / 255
            parts.append(encode(shown if view is None else view(shown)).cpu())
        self.net.train(was_training)
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    @torch.no_grad()
    def encode_tokens(self, tokens: NDArray[np.uint16], batch_size: int = 1024, raw: bool = False) -> Tensor:
        """Features float32 (n, d) on the CPU, in eval mode; unit-length unless `raw`."""
        encode = self.raw_text if raw else self.text
        was_training = self.net.training
        self.net.eval()
        parts = [encode(torch.from_numpy(tokens[begin : begin + batch_size].astype(np.int64)).to(self.device)).cpu() for begin in range(0, len(tokens), batch_size)]
        self.net.train(was_training)
        return torch.cat(parts) if parts else torch.zeros(0, self.width)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Features float32 (n, d) on the CPU, in eval mode; over-long texts keep their end token."""
        return self.encode_tokens(self.tokenizer.encode(texts)[0])

    def state(self) -> dict[str, Tensor]:
        """Weights and batch statistics on the CPU, under open_clip's names."""
        values = dict(self.net.state_dict())
        embedding = self.net.get_submodule("token_embedding")
        if isinstance(embedding, ActiveEmbedding):
            values["token_embedding.weight"] = embedding.whole()
            del values["token_embedding.active"]
        return {name: value.detach().cpu().contiguous() for name, value in values.items()}

    def train_only(self, tokens: NDArray[np.int64]) -> None:
        """Lets the token embedding train the rows of these tokens alone, until the weights are saved and loaded again."""
        embedding = self.net.get_submodule("token_embedding")
        if isinstance(embedding, nn.Embedding):
            self.net.add_module("token_embedding", ActiveEmbedding(embedding, torch.from_numpy(tokens).to(self.device)))

    def weights_sha256(self) -> str:
        """A name for these very weights."""
        return hashlib.sha256(save_bytes(self.state())).hexdigest()

    def identity(self) -> str:
        """A name for all that features depend on: the weights, and what weights do not tell where it is not the usual.

        That is the normalisation, unless it is CLIP's, and the configuration, unless it is `bench-small`: activations and the
        width of attention heads have no weights.
        """
        untold = [] if (self.mean, self.std) == (MEAN, STD) else [digest([self.mean, self.std])[:16]]
        if self.config and (architecture := _architecture(self.config)) != _architecture(SMALL):
            untold.append(digest(architecture)[:16])
        return ":".join([self.weights_sha256(), *untold])


def _count(tower: str, features: Tensor) -> None:
    passes[f"{tower}_{'backward' if features.requires_grad else 'forward'}"] += len(features)


def build(settings: ModelSettings, side: int, seed: int, device: torch.device, precision: str = "fp32") -> Model:
    """A freshly initialised model; no weights are downloaded and no global generator is moved."""
    return assemble(settings.name, resized(configuration(settings.name), side, settings.context_length), seed, device, precision)


def assemble(name: str, config: Mapping[str, Any], seed: int, device: torch.device, precision: str = "fp32", mean: Colour = MEAN, std: Colour = STD) -> Model:
    """A freshly initialised model of an open_clip configuration whose text tower is CLIP's."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_key("init", seed) % 2**63)
        net = open_clip.CLIP(**config)
    net = net.to(device=device, memory_format=torch.channels_last)
    tokens = _tokenizer(config["text_cfg"].get("context_length"))
    return Model(net, tokens, config["vision_cfg"]["image_size"], device, precision, mean, std, name, dict(config))


def tokenizer(settings: ModelSettings) -> Tokenizer:
    """The tokenizer of an architecture, at the context length in use."""
    return _tokenizer(settings.context_length or configuration(settings.name)["text_cfg"].get("context_length"))


def configuration(name: str) -> dict[str, Any]:
    """The open_clip configuration of an architecture.

    Raises:
        BenchError: an unknown name (with the nearest match), or a text tower other than CLIP's.
    """
    if name == "bench-small":
        return SMALL
    if name not in open_clip.list_models():
        raise unknown("model", name, ["bench-small", *open_clip.list_models()])
    config: dict[str, Any] = open_clip.get_model_config(name)
    return plain(name, config)


def plain(name: str, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration itself.

    Raises:
        BenchError: its text tower is not CLIP's.
    """
    text = config.get("text_cfg", {})
    if config.get("custom_text") or text.get("hf_model_name") or text.get("pool_type", "argmax") != "argmax":
        raise BenchError(f"model {name!r} has a text tower other than CLIP's, which this program does not train; take RN50, ViT-B-32 or another plain one")
    return config


def resized(config: Mapping[str, Any], side: int, context_length: int | None = None) -> dict[str, Any]:
    """A copy of a configuration for images of this side and, if it is given, texts of this length."""
    changed: dict[str, Any] = json.loads(json.dumps(config))
    changed["vision_cfg"]["image_size"] = side
    if context_length:
        changed["text_cfg"]["context_length"] = context_length
    return {key: value for key, value in changed.items() if key in ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu")}


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says beyond sizes of images and texts and where first weights come from."""
    found = {"quick_gelu": False, **resized(config, 0, 1)}
    found["vision_cfg"].pop("timm_model_pretrained", None)
    return found


def published(name: str, tag: str) -> dict[str, Any]:
    """What open_clip knows of the pretrained weights of this tag: where they lie, and how images were prepared for them.

    Raises:
        BenchError: open_clip knows no such weights of the architecture.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag not in tags:
        if not tags:
            raise BenchError(f"open_clip knows no pretrained weights of {name!r}; give a file with --checkpoint")
        raise unknown(f"pretrained tag of {name}", tag, tags)
    return dict(open_clip.get_pretrained_cfg(name, tag))


def optimizer(net: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW with decoupled decay on matrices; biases, norms and the temperature have none."""
    trainable = [parameter for parameter in net.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True)


def save_weights(model: Model, path: Path) -> None:
    """Writes a safetensors file, whole or not at all."""
    write_atomically(path, save_bytes(model.state()))


def load_weights(path: Path, settings: ModelSettings, side: int, device: torch.device, precision: str = "fp32") -> Model:
    """The model of a safetensors file, in eval mode; names and shapes must match.

    Raises:
        BenchError: the file is broken or belongs to another architecture.
    """
    model = build(settings, side, 0, device, precision)
    try:
        model.net.load_state_dict(load_bytes(path.read_bytes()), strict=True)
    except Exception as error:
        raise BenchError(f"{path} does not hold weights of {settings.name}: {str(error).splitlines()[0]}") from None
    model.net.eval()
    return model


def _text_features(net: nn.Module, tokens: Tensor) -> Tensor:
    length = tokens.shape[1]
    mask: Tensor = net.get_buffer("attn_mask")
    x = net.get_submodule("token_embedding")(tokens) + net.get_parameter("positional_embedding")[:length]
    x = net.get_submodule("transformer")(x, attn_mask=mask[:length, :length])
    x = torch.as_tensor(net.get_submodule("ln_final")(x))
    ends = x[torch.arange(len(x), device=x.device), tokens.argmax(dim=-1)]
    return ends @ net.get_parameter("text_projection")


@functools.cache
def _statistics(device: torch.device, mean: Colour, std: Colour) -> tuple[Tensor, Tensor]:
    return torch.tensor(mean, device=device).view(3, 1, 1), torch.tensor(std, device=device).view(3, 1, 1)


def _tokenizer(context_length: int | None) -> Tokenizer:
    return Tokenizer("open_clip-simple", context_length or 77, _bpe())


@functools.cache
def _bpe() -> Any:
    return open_clip.SimpleTokenizer()
