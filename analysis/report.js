"use strict";
const order = new Intl.Collator("en", { numeric: true });

const keyOf = (cell) => cell.dataset.sort ?? cell.textContent.trim();

function compare(a, b) {
  const [x, y] = [Number(a), Number(b)];
  return Number.isNaN(x) || Number.isNaN(y) ? order.compare(a, b) : x - y;
}

// What has no key stays last, whichever way the others go.
function sort(table, column, sign) {
  for (const body of table.tBodies) {
    const keyed = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
    keyed.sort(([a], [b]) => (a === "" || b === "" ? (a === "") - (b === "") : sign * compare(a, b)));
    body.append(...keyed.map(([, row]) => row));
  }
}

for (const table of document.querySelectorAll("main table:has(thead)")) {
  const heads = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    if (!button.textContent.trim()) button.textContent = "rows";
    button.title = "sort";
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table, column, down ? -1 : 1);
    });
    head.append(button);
  });
}

const filter = document.getElementById("filter");
const rows = [...document.querySelectorAll("#outcomes tbody tr")];
const texts = rows.map((row) => row.textContent.toLowerCase());
const shown = document.getElementById("shown");
filter.addEventListener("input", () => {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const match = texts.map((text) => words.every((word) => text.includes(word)));
  rows.forEach((row, i) => { row.hidden = !match[i]; });
  shown.textContent = `${match.filter(Boolean).length} of ${rows.length} ${rows.length === 1 ? "run" : "runs"}`;
});
filter.closest("p").hidden = false;
