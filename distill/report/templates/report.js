"use strict";
// The page without this script shows everything, one below the other. It adds choosing and sorting.
// What results say is read from the page's own text and attributes and set as text: never as markup.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
document.documentElement.classList.add("js");

// One system brought out, one metric chosen.

one("#highlight").addEventListener("change", ({ target }) => {
  document.body.classList.toggle("dimmed", target.value !== "");
  for (const node of all("[data-system]")) node.classList.toggle("lit", node.dataset.system === target.value);
});

one("#metric").addEventListener("change", ({ target }) => {
  for (const node of all("[data-metric]")) node.hidden = target.value !== "" && node.dataset.metric !== target.value;
  for (const body of all(".measured tbody")) body.hidden = all("[data-metric]", body).every((row) => row.hidden);
  const found = all("#differences figure[data-metric]").find((figure) => !figure.hidden);
  if (target.value && found?.closest("details")) found.closest("details").open = true;
});

one("#seeds")?.addEventListener("change", ({ target }) => one(".measured").classList.toggle("each", target.checked));

// Tables: a heading sorts, once up and once down; what has no value stands last.

for (const heading of all(".sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = heading.textContent;
  heading.replaceChildren(button);
  button.addEventListener("click", () => {
    const down = heading.getAttribute("aria-sort") === "ascending";
    all("th", heading.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const column = heading.cellIndex;
    const numbers = column > 1 && all("td[data-value]", heading.closest("table")).some((cell) => cell.cellIndex === column);
    const value = (row) => {
      const { dataset, textContent } = row.cells[column];
      return numbers ? (dataset.value === undefined ? null : Number(dataset.value)) : textContent;
    };
    const body = one("tbody", heading.closest("table"));
    const rows = all("tr", body).map((row) => [value(row), row]);
    rows.sort(([a], [b]) => {
      if (a === null || b === null) return (a === null) - (b === null);
      return (down ? -1 : 1) * (numbers ? a - b : a.localeCompare(b));
    });
    body.append(...rows.map(([, row]) => row));
  });
}

// Prompts: found, ordered, a few at a time.

const FEW = 6;
const cards = all(".prompt");
let most = FEW;

function arrange() {
  const words = one("#search").value.trim().toLowerCase();
  const by = one("#order").value;
  const fits = cards.filter((card) => card.textContent.toLowerCase().includes(words));
  fits.sort((a, b) => (by === "text"
    ? one("h3", a).textContent.localeCompare(one("h3", b).textContent)
    : a.dataset.place - b.dataset.place));
  for (const card of cards) card.hidden = true;
  fits.slice(0, most).forEach((card) => { card.hidden = false; });
  one("#cards").append(...fits);
  one("#more").hidden = fits.length <= most;
  one("#count").textContent = fits.length === cards.length
    ? `${Math.min(most, fits.length)} of ${cards.length} shown`
    : `${fits.length} of ${cards.length} match, ${Math.min(most, fits.length)} shown`;
}

if (cards.length) {
  one("#search").addEventListener("input", arrange);
  one("#order").addEventListener("change", arrange);
  one("#more").addEventListener("click", () => { most += 3 * FEW; arrange(); });
  one("#dreams").addEventListener("click", ({ target }) => {
    const open = target.getAttribute("aria-pressed") !== "true";
    target.setAttribute("aria-pressed", String(open));
    target.textContent = open ? "Close all dreams" : "Open all dreams";
    for (const dream of all(".dream")) dream.open = open;
  });
  arrange();
}

addEventListener("beforeprint", () => all("details").forEach((each) => { each.open = true; }));
