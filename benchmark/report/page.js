// Sorting, and the way back from a cell. Switching and opening work without it.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const rising = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows];
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const numeric = head.classList.contains("number");
      rows.sort((a, b) => {
        const [left, right] = [key(a), key(b)];
        if (left === "" || right === "") return (left === "") - (right === "");
        const order = numeric ? Number(left) - Number(right) : left.localeCompare(right);
        return rising ? order : -order;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
let opener = null;
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#cell-"]');
  if (link) opener = link;
});
addEventListener("hashchange", () => {
  const cell = document.querySelector(".cell:target");
  if (cell) cell.focus({ preventScroll: true });
});
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || !document.querySelector(".cell:target")) return;
  location.hash = "#map";
  (opener ?? document.querySelector(".heat a"))?.focus();
});
