"""Evaluation sets that are known by name, and display names of their classes by the name that the data set gives a class."""

from __future__ import annotations

import os
from pathlib import Path

from benchmark.errors import BenchError, nearest, unknown

PREFIX = "torchvision:"
_OTHER_NAMES = {"oxfordpets": "pets", "oxfordiiitpet": "pets", "stanfordcars": "cars", "fgvcaircraft": "aircraft", "imagenet1k": "imagenet"}

# Names are separated by `;`. `name=words` shows the words instead of the name; elsewhere `_` becomes a space.
_NAMES = {
    "cifar10": """
        airplane; automobile; bird; cat; deer; dog; frog; horse; ship; truck
    """,
    "cifar100": """
        apple; aquarium_fish; baby; bear; beaver; bed; bee; beetle; bicycle; bottle; bowl; boy; bridge; bus; butterfly; camel; can; castle; caterpillar;
        cattle; chair; chimpanzee; clock; cloud; cockroach; couch; crab; crocodile; cup; dinosaur; dolphin; elephant; flatfish; forest; fox; girl; hamster;
        house; kangaroo; keyboard; lamp; lawn_mower; leopard; lion; lizard; lobster; man; maple_tree; motorcycle; mountain; mouse; mushroom; oak_tree; orange;
        orchid; otter; palm_tree; pear; pickup_truck; pine_tree; plain; plate; poppy; porcupine; possum; rabbit; raccoon; ray; road; rocket; rose; sea; seal;
        shark; shrew; skunk; skyscraper; snail; snake; spider; squirrel; streetcar; sunflower; sweet_pepper; table; tank; telephone; television; tiger;
        tractor; train; trout; tulip; turtle; wardrobe; whale; willow_tree; wolf; woman; worm
    """,
    "food101": """
        apple_pie; baby_back_ribs; baklava; beef_carpaccio; beef_tartare; beet_salad; beignets; bibimbap; bread_pudding; breakfast_burrito; bruschetta;
        caesar_salad; cannoli; caprese_salad; carrot_cake; ceviche; cheesecake; cheese_plate; chicken_curry; chicken_quesadilla; chicken_wings;
        chocolate_cake; chocolate_mousse; churros; clam_chowder; club_sandwich; crab_cakes; creme_brulee; croque_madame; cup_cakes; deviled_eggs; donuts;
        dumplings; edamame; eggs_benedict; escargots; falafel; filet_mignon; fish_and_chips; foie_gras; french_fries; french_onion_soup; french_toast;
        fried_calamari; fried_rice; frozen_yogurt; garlic_bread; gnocchi; greek_salad; grilled_cheese_sandwich; grilled_salmon; guacamole; gyoza; hamburger;
        hot_and_sour_soup; hot_dog; huevos_rancheros; hummus; ice_cream; lasagna; lobster_bisque; lobster_roll_sandwich; macaroni_and_cheese; macarons;
        miso_soup; mussels; nachos; omelette; onion_rings; oysters; pad_thai; paella; pancakes; panna_cotta; peking_duck; pho; pizza; pork_chop; poutine;
        prime_rib; pulled_pork_sandwich; ramen; ravioli; red_velvet_cake; risotto; samosa; sashimi; scallops; seaweed_salad; shrimp_and_grits;
        spaghetti_bolognese; spaghetti_carbonara; spring_rolls; steak; strawberry_shortcake; sushi; tacos; takoyaki; tiramisu; tuna_tartare; waffles
    """,
    "flowers102": """
        pink primrose; hard-leaved pocket orchid; canterbury bells; sweet pea; english marigold; tiger lily; moon orchid; bird of paradise; monkshood; globe
        thistle; snapdragon; colt's foot; king protea; spear thistle; yellow iris; globe-flower; purple coneflower; peruvian lily; balloon flower; giant white
        arum lily; fire lily; pincushion flower; fritillary; red ginger; grape hyacinth; corn poppy; prince of wales feathers; stemless gentian; artichoke;
        sweet william; carnation; garden phlox; love in the mist; mexican aster; alpine sea holly; ruby-lipped cattleya; cape flower; great masterwort; siam
        tulip; lenten rose; barbeton daisy; daffodil; sword lily; poinsettia; bolero deep blue; wallflower; marigold; buttercup; oxeye daisy; common
        dandelion; petunia; wild pansy; primula; sunflower; pelargonium; bishop of llandaff; gaura; geranium; orange dahlia; pink-yellow dahlia?=pink-yellow
        dahlia; cautleya spicata; japanese anemone; black-eyed susan; silverbush; californian poppy; osteospermum; spring crocus; bearded iris; windflower;
        tree poppy; gazania; azalea; water lily; rose; thorn apple; morning glory; passion flower; lotus; toad lily; anthurium; frangipani; clematis;
        hibiscus; columbine; desert-rose; tree mallow; magnolia; cyclamen; watercress; canna lily; hippeastrum; bee balm; ball moss; foxglove; bougainvillea;
        camellia; mallow; mexican petunia; bromelia; blanket flower; trumpet creeper; blackberry lily
    """,
    "dtd": """
        banded; blotchy; braided; bubbly; bumpy; chequered; cobwebbed; cracked; crosshatched; crystalline; dotted; fibrous; flecked; freckled; frilly; gauzy;
        grid; grooved; honeycombed; interlaced; knitted; lacelike; lined; marbled; matted; meshed; paisley; perforated; pitted; pleated; polka-dotted; porous;
        potholed; scaly; smeared; spiralled; sprinkled; stained; stratified; striped; studded; swirly; veined; waffled; woven; wrinkled; zigzagged
    """,
    "caltech101": """
        Faces=face; Faces_easy=face_close_up; Leopards=leopard; Motorbikes=motorbike; accordion; airplanes=airplane; anchor; ant; barrel; bass; beaver;
        binocular=binoculars; bonsai=bonsai_tree; brain; brontosaurus; buddha=statue_of_Buddha; butterfly; camera; cannon; car_side=car_seen_from_the_side;
        ceiling_fan; cellphone=mobile_phone; chair; chandelier; cougar_body=cougar; cougar_face=face_of_a_cougar; crab; crayfish; crocodile;
        crocodile_head=head_of_a_crocodile; cup; dalmatian; dollar_bill; dolphin; dragonfly; electric_guitar; elephant; emu; euphonium; ewer; ferry; flamingo;
        flamingo_head=head_of_a_flamingo; garfield=Garfield; gerenuk; gramophone; grand_piano; hawksbill=hawksbill_turtle; headphone=headphones; hedgehog;
        helicopter; ibis; inline_skate; joshua_tree=Joshua_tree; kangaroo; ketch; lamp; laptop; llama; lobster; lotus=lotus_flower; mandolin; mayfly; menorah;
        metronome; minaret; nautilus; octopus; okapi; pagoda; panda; pigeon; pizza; platypus; pyramid; revolver; rhino=rhinoceros; rooster; saxophone;
        schooner; scissors; scorpion; sea_horse=seahorse; snoopy=Snoopy; soccer_ball; stapler; starfish; stegosaurus; stop_sign; strawberry; sunflower; tick;
        trilobite; umbrella; watch=wristwatch; water_lilly=water_lily; wheelchair; wild_cat=wildcat; windsor_chair=Windsor_chair; wrench;
        yin_yang=yin_and_yang_symbol
    """,
    "pets": """
        Abyssinian; American Bulldog; American Pit Bull Terrier; Basset Hound; Beagle; Bengal; Birman; Bombay; Boxer; British Shorthair; Chihuahua; Egyptian
        Mau; English Cocker Spaniel; English Setter; German Shorthaired=German Shorthaired Pointer; Great Pyrenees; Havanese; Japanese Chin; Keeshond;
        Leonberger; Maine Coon; Miniature Pinscher; Newfoundland; Persian; Pomeranian; Pug; Ragdoll; Russian Blue; Saint Bernard; Samoyed; Scottish Terrier;
        Shiba Inu; Siamese; Sphynx; Staffordshire Bull Terrier; Wheaten Terrier; Yorkshire Terrier
    """,
    "cars": """
        AM General Hummer SUV 2000; Acura RL Sedan 2012; Acura TL Sedan 2012; Acura TL Type-S 2008; Acura TSX Sedan 2012; Acura Integra Type R 2001; Acura ZDX
        Hatchback 2012; Aston Martin V8 Vantage Convertible 2012; Aston Martin V8 Vantage Coupe 2012; Aston Martin Virage Convertible 2012; Aston Martin
        Virage Coupe 2012; Audi RS 4 Convertible 2008; Audi A5 Coupe 2012; Audi TTS Coupe 2012; Audi R8 Coupe 2012; Audi V8 Sedan 1994; Audi 100 Sedan 1994;
        Audi 100 Wagon 1994; Audi TT Hatchback 2011; Audi S6 Sedan 2011; Audi S5 Convertible 2012; Audi S5 Coupe 2012; Audi S4 Sedan 2012; Audi S4 Sedan 2007;
        Audi TT RS Coupe 2012; BMW ActiveHybrid 5 Sedan 2012; BMW 1 Series Convertible 2012; BMW 1 Series Coupe 2012; BMW 3 Series Sedan 2012; BMW 3 Series
        Wagon 2012; BMW 6 Series Convertible 2007; BMW X5 SUV 2007; BMW X6 SUV 2012; BMW M3 Coupe 2012; BMW M5 Sedan 2010; BMW M6 Convertible 2010; BMW X3 SUV
        2012; BMW Z4 Convertible 2012; Bentley Continental Supersports Conv. Convertible 2012=Bentley Continental Supersports Convertible 2012; Bentley Arnage
        Sedan 2009; Bentley Mulsanne Sedan 2011; Bentley Continental GT Coupe 2012; Bentley Continental GT Coupe 2007; Bentley Continental Flying Spur Sedan
        2007; Bugatti Veyron 16.4 Convertible 2009; Bugatti Veyron 16.4 Coupe 2009; Buick Regal GS 2012; Buick Rainier SUV 2007; Buick Verano Sedan 2012;
        Buick Enclave SUV 2012; Cadillac CTS-V Sedan 2012; Cadillac SRX SUV 2012; Cadillac Escalade EXT Crew Cab 2007; Chevrolet Silverado 1500 Hybrid Crew
        Cab 2012; Chevrolet Corvette Convertible 2012; Chevrolet Corvette ZR1 2012; Chevrolet Corvette Ron Fellows Edition Z06 2007; Chevrolet Traverse SUV
        2012; Chevrolet Camaro Convertible 2012; Chevrolet HHR SS 2010; Chevrolet Impala Sedan 2007; Chevrolet Tahoe Hybrid SUV 2012; Chevrolet Sonic Sedan
        2012; Chevrolet Express Cargo Van 2007; Chevrolet Avalanche Crew Cab 2012; Chevrolet Cobalt SS 2010; Chevrolet Malibu Hybrid Sedan 2010; Chevrolet
        TrailBlazer SS 2009; Chevrolet Silverado 2500HD Regular Cab 2012; Chevrolet Silverado 1500 Classic Extended Cab 2007; Chevrolet Express Van 2007;
        Chevrolet Monte Carlo Coupe 2007; Chevrolet Malibu Sedan 2007; Chevrolet Silverado 1500 Extended Cab 2012; Chevrolet Silverado 1500 Regular Cab 2012;
        Chrysler Aspen SUV 2009; Chrysler Sebring Convertible 2010; Chrysler Town and Country Minivan 2012; Chrysler 300 SRT-8 2010; Chrysler Crossfire
        Convertible 2008; Chrysler PT Cruiser Convertible 2008; Daewoo Nubira Wagon 2002; Dodge Caliber Wagon 2012; Dodge Caliber Wagon 2007; Dodge Caravan
        Minivan 1997; Dodge Ram Pickup 3500 Crew Cab 2010; Dodge Ram Pickup 3500 Quad Cab 2009; Dodge Sprinter Cargo Van 2009; Dodge Journey SUV 2012; Dodge
        Dakota Crew Cab 2010; Dodge Dakota Club Cab 2007; Dodge Magnum Wagon 2008; Dodge Challenger SRT8 2011; Dodge Durango SUV 2012; Dodge Durango SUV 2007;
        Dodge Charger Sedan 2012; Dodge Charger SRT-8 2009; Eagle Talon Hatchback 1998; FIAT 500 Abarth 2012; FIAT 500 Convertible 2012; Ferrari FF Coupe
        2012; Ferrari California Convertible 2012; Ferrari 458 Italia Convertible 2012; Ferrari 458 Italia Coupe 2012; Fisker Karma Sedan 2012; Ford F-450
        Super Duty Crew Cab 2012; Ford Mustang Convertible 2007; Ford Freestar Minivan 2007; Ford Expedition EL SUV 2009; Ford Edge SUV 2012; Ford Ranger
        SuperCab 2011; Ford GT Coupe 2006; Ford F-150 Regular Cab 2012; Ford F-150 Regular Cab 2007; Ford Focus Sedan 2007; Ford E-Series Wagon Van 2012; Ford
        Fiesta Sedan 2012; GMC Terrain SUV 2012; GMC Savana Van 2012; GMC Yukon Hybrid SUV 2012; GMC Acadia SUV 2012; GMC Canyon Extended Cab 2012; Geo Metro
        Convertible 1993; HUMMER H3T Crew Cab 2010; HUMMER H2 SUT Crew Cab 2009; Honda Odyssey Minivan 2012; Honda Odyssey Minivan 2007; Honda Accord Coupe
        2012; Honda Accord Sedan 2012; Hyundai Veloster Hatchback 2012; Hyundai Santa Fe SUV 2012; Hyundai Tucson SUV 2012; Hyundai Veracruz SUV 2012; Hyundai
        Sonata Hybrid Sedan 2012; Hyundai Elantra Sedan 2007; Hyundai Accent Sedan 2012; Hyundai Genesis Sedan 2012; Hyundai Sonata Sedan 2012; Hyundai
        Elantra Touring Hatchback 2012; Hyundai Azera Sedan 2012; Infiniti G Coupe IPL 2012; Infiniti QX56 SUV 2011; Isuzu Ascender SUV 2008; Jaguar XK XKR
        2012; Jeep Patriot SUV 2012; Jeep Wrangler SUV 2012; Jeep Liberty SUV 2012; Jeep Grand Cherokee SUV 2012; Jeep Compass SUV 2012; Lamborghini Reventon
        Coupe 2008; Lamborghini Aventador Coupe 2012; Lamborghini Gallardo LP 570-4 Superleggera 2012; Lamborghini Diablo Coupe 2001; Land Rover Range Rover
        SUV 2012; Land Rover LR2 SUV 2012; Lincoln Town Car Sedan 2011; MINI Cooper Roadster Convertible 2012; Maybach Landaulet Convertible 2012; Mazda
        Tribute SUV 2011; McLaren MP4-12C Coupe 2012; Mercedes-Benz 300-Class Convertible 1993; Mercedes-Benz C-Class Sedan 2012; Mercedes-Benz SL-Class Coupe
        2009; Mercedes-Benz E-Class Sedan 2012; Mercedes-Benz S-Class Sedan 2012; Mercedes-Benz Sprinter Van 2012; Mitsubishi Lancer Sedan 2012; Nissan Leaf
        Hatchback 2012; Nissan NV Passenger Van 2012; Nissan Juke Hatchback 2012; Nissan 240SX Coupe 1998; Plymouth Neon Coupe 1999; Porsche Panamera Sedan
        2012; Ram C/V Cargo Van Minivan 2012; Rolls-Royce Phantom Drophead Coupe Convertible 2012; Rolls-Royce Ghost Sedan 2012; Rolls-Royce Phantom Sedan
        2012; Scion xD Hatchback 2012; Spyker C8 Convertible 2009; Spyker C8 Coupe 2009; Suzuki Aerio Sedan 2007; Suzuki Kizashi Sedan 2012; Suzuki SX4
        Hatchback 2012; Suzuki SX4 Sedan 2012; Tesla Model S Sedan 2012; Toyota Sequoia SUV 2012; Toyota Camry Sedan 2012; Toyota Corolla Sedan 2012; Toyota
        4Runner SUV 2012; Volkswagen Golf Hatchback 2012; Volkswagen Golf Hatchback 1991; Volkswagen Beetle Hatchback 2012; Volvo C30 Hatchback 2012; Volvo
        240 Sedan 1993; Volvo XC90 SUV 2007; smart fortwo Convertible 2012
    """,
    "aircraft": """
        707-320; 727-200; 737-200; 737-300; 737-400; 737-500; 737-600; 737-700; 737-800; 737-900; 747-100; 747-200; 747-300; 747-400; 757-200; 757-300;
        767-200; 767-300; 767-400; 777-200; 777-300; A300B4; A310; A318; A319; A320; A321; A330-200; A330-300; A340-200; A340-300; A340-500; A340-600; A380;
        ATR-42; ATR-72; An-12; BAE 146-200; BAE 146-300; BAE-125; Beechcraft 1900; Boeing 717; C-130; C-47; CRJ-200; CRJ-700; CRJ-900; Cessna 172; Cessna 208;
        Cessna 525; Cessna 560; Challenger 600; DC-10; DC-3; DC-6; DC-8; DC-9-30; DH-82; DHC-1; DHC-6; DHC-8-100; DHC-8-300; DR-400; Dornier 328; E-170;
        E-190; E-195; EMB-120; ERJ 135; ERJ 145; Embraer Legacy 600; Eurofighter Typhoon; F-16A/B; F/A-18; Falcon 2000; Falcon 900; Fokker 100; Fokker 50;
        Fokker 70; Global Express; Gulfstream IV; Gulfstream V; Hawk T1; Il-76; L-1011; MD-11; MD-80; MD-87; MD-90; Metroliner; Model B200; PA-28; SR-20; Saab
        2000; Saab 340; Spitfire; Tornado; Tu-134; Tu-154; Yak-42
    """,
}


KNOWN_NAMES = (*_NAMES, "imagenet")


def display_names(data_set: str) -> dict[str, str]:
    """Display names by class name, for one of the sets that this program knows by name (all but ImageNet)."""
    entries = [" ".join(entry.split()).partition("=") for entry in _NAMES[data_set].split(";")]
    return {name: (words or name).replace("_", " ") for name, _, words in entries}


def known_name(text: str) -> str | None:
    """The name of the set that `--eval` asks for by name, or None if it names no known one.

    Raises:
        BenchError: `torchvision:` before a name that is not known, or a name that is also a folder here.
    """
    bare = text.removeprefix(PREFIX)
    plain = bare.casefold().replace("-", "").replace("_", "")
    name = _OTHER_NAMES.get(plain, plain)
    if name not in KNOWN_NAMES:
        if text.startswith(PREFIX):
            raise unknown("evaluation set", bare, KNOWN_NAMES)
        return None
    if bare == text and Path(text).is_dir():
        raise BenchError(f"{text!r} is a folder here and the name of a data set; write ./{text} or {PREFIX}{name}")
    return name


def not_a_set(text: str) -> BenchError:
    """The error for something that is neither a folder nor a known name."""
    guess = None if os.sep in text else nearest(text, KNOWN_NAMES)
    hint = f" Did you mean {guess!r}?" if guess else ""
    return BenchError(f"no evaluation set at {text}; expected a folder, or one of {', '.join(sorted(KNOWN_NAMES))}.{hint}")
