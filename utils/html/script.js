// Not needed to read the page: sorts tables by a click on a column's title, closes an enlarged picture by Escape,
// and goes to its neighbours by the arrow keys.
"use strict";
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.tHead.querySelectorAll("th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const text = (row) => row.cells[column].textContent.trim();
      const number = (row) => parseFloat(text(row).replace("−", "-"));
      const compare = (a, b) => {
        const [x, y] = [number(a), number(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) {
          if (Number.isNaN(x) !== Number.isNaN(y)) return Number.isNaN(x) ? 1 : -1; // n/a stays last
          return (down ? -1 : 1) * text(a).localeCompare(text(b), undefined, { numeric: true });
        }
        return down ? y - x : x - y;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
document.addEventListener("keydown", (event) => {
  const shown = document.querySelector(".shot:target");
  if (!shown) return;
  if (event.key === "Escape") location.hash = shown.querySelector(".close").getAttribute("href");
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step) return;
  const all = [...document.querySelectorAll(".shot")];
  const next = all[all.indexOf(shown) + step];
  if (next) location.hash = next.id;
});
