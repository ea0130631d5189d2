"use strict";
// The page without this script shows every dream, one below the other. It adds the edges' geometry and the walking.
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const one = (selector, within = document) => within.querySelector(selector);
const dreams = all(".dream");
let shown = dreams[0];
let pinned = null; // the step or word that was chosen; hovering looks elsewhere for a moment only
const records = JSON.parse(one("#records").textContent).dreams;

const at = (node) => `${node.dataset.branch}.${node.dataset.step}`;
const nodeAt = (place) => one(`.node[data-branch="${place.split(".")[0]}"][data-step="${place.split(".")[1]}"]`, shown);
const named = (node) => all(".label", node).map((label) => label.textContent).join(" · ");

// Edges: along a path straight, across paths in the gutter, down on the right of the steps and up on the left.

function curve(a, b, kind) {
  if (kind === "temporal") {
    const [x, y, u, v] = [a.right, (a.top + a.bottom) / 2, b.left - 3, (b.top + b.bottom) / 2];
    const bend = Math.max(12, (u - x) / 2);
    return `M${x},${y}C${x + bend},${y} ${u - bend},${v} ${u},${v}`;
  }
  const down = a.top < b.top;
  const side = down ? 1 : -1;
  const [x, u] = down ? [a.right, b.right + 3] : [a.left, b.left - 3];
  const y = a.top + (a.bottom - a.top) * (down ? 0.8 : 0.2);
  const v = b.top + (b.bottom - b.top) * (down ? 0.2 : 0.8);
  const bulge = side * Math.min(34, 14 + Math.abs(v - y) / 22);
  return `M${x},${y}C${x + bulge},${y} ${u + bulge},${v} ${u},${v}`;
}

function draw() {
  if (!shown) return;
  const origin = one(".board", shown).getBoundingClientRect();
  const boxes = new Map();
  for (const node of all(".node", shown)) {
    const box = node.getBoundingClientRect();
    const [left, top] = [box.left - origin.left, box.top - origin.top];
    boxes.set(at(node), { left, top, right: left + box.width, bottom: top + box.height });
  }
  const least = Number(one("#least").value) / 100;
  for (const edge of all(".edge", shown)) {
    const { from, to, kind, weight } = edge.dataset;
    edge.setAttribute("d", curve(boxes.get(from), boxes.get(to), kind));
    edge.classList.toggle("weak", !one(`#${kind}`).checked || Number(weight) < least);
  }
}

// Following: a step's edges in and out, where they lead, and the path that it lies on.

function follow(node) {
  const board = one(".board", shown);
  light(node);
  const word = node?.matches(".word");
  board.classList.toggle("following", Boolean(node) && !word);
  all(".here, .source, .target, .way, .in, .out", shown).forEach((marked) =>
    marked.classList.remove("here", "source", "target", "way", "in", "out"));
  if (word) node.classList.add("here");
  if (!node || word) return;
  const place = at(node);
  node.classList.add("here");
  for (const step of all(`.node[data-branch="${node.dataset.branch}"]`, board)) step.classList.add("way");
  for (const edge of all(".edge", board)) {
    const { from, to, kind } = edge.dataset;
    if (from === place) { edge.classList.add("out"); nodeAt(to).classList.add("target"); }
    else if (to === place) { edge.classList.add("in"); nodeAt(from).classList.add("source"); }
    else if (kind === "temporal" && from.split(".")[0] === node.dataset.branch) edge.classList.add("way");
  }
}

// Reading: what a word of the answer attended to, and which words attended to a step.

function share(word, node) {
  const said = records[dreams.indexOf(shown)].words[Number(word.dataset.word)];
  const first = 3 * Number(node.dataset.read ?? NaN);
  return said.tokens.slice(first, first + 3).reduce((sum, part) => sum + part, 0);
}

function shares(chosen) {
  if (chosen.matches(".word")) return all(".node[data-read]", shown).map((node) => [node, share(chosen, node)]);
  return chosen.dataset.read ? all(".word", shown).map((word) => [word, share(word, chosen)]) : [];
}

function light(chosen) {
  one(".board", shown).classList.toggle("reading", Boolean(chosen?.matches(".word")));
  all(".word, .node", shown).forEach((lit) => lit.style.removeProperty("--r"));
  if (!chosen) return;
  const found = shares(chosen);
  const most = Math.max(...found.map(([, part]) => part), 1e-9);
  for (const [lit, part] of found) lit.style.setProperty("--r", part / most);
}

function read(word) {
  const said = records[dreams.indexOf(shown)].words[Number(word.dataset.word)];
  const [ways, column, heading] = ["div", "div", "span"].map((tag) => document.createElement(tag));
  const told = ["question", "dream", "answer"].map((part) => `${part} ${(100 * said[part]).toFixed(0)} %`).join(", ");
  ways.className = "ways";
  heading.textContent = `Read ${told}; of the dream:`;
  column.append(heading);
  for (const [node, part] of shares(word).sort((a, b) => b[1] - a[1]).slice(0, 6)) column.append(way(node, part));
  ways.append(column);
  return ways;
}

function way(node, weight) {
  const button = document.createElement("button");
  const number = document.createElement("b");
  number.textContent = weight.toFixed(2);
  button.type = "button";
  button.append(number, `${node.closest(".lane").dataset.lens} ${Number(node.dataset.step) + 1}: ${named(node)}`);
  button.addEventListener("click", () => { choose(node); node.focus(); });
  return button;
}

function tell(node) {
  const detail = one(".detail", shown);
  if (!detail.dataset.hint) detail.dataset.hint = one("p", detail).textContent;
  const heading = document.createElement(node ? "h3" : "p");
  heading.textContent = node?.matches(".word") ? `“${node.textContent}”` : node ? `${node.closest(".lane").dataset.lens}, step ${Number(node.dataset.step) + 1}: ${named(node)}` : detail.dataset.hint;
  detail.replaceChildren(heading);
  detail.classList.toggle("chosen", Boolean(node));
  if (!node) return;
  if (node.matches(".word")) return detail.append(read(node));
  const ways = document.createElement("div");
  ways.className = "ways";
  ways.append(led(node, "from", "to", "Comes from"), led(node, "to", "from", "Leads to"));
  detail.append(ways);
}

function led(node, far, near, title) {
  const place = at(node);
  const column = document.createElement("div");
  const heading = document.createElement("span");
  heading.className = far;
  heading.textContent = title;
  column.append(heading);
  const edges = all(".edge", shown).filter((edge) => edge.dataset[near] === place);
  edges.sort((a, b) => (a.dataset.kind < b.dataset.kind) - (a.dataset.kind > b.dataset.kind) || b.dataset.importance - a.dataset.importance);
  for (const edge of edges) column.append(way(nodeAt(edge.dataset[far]), Number(edge.dataset.importance)));
  if (!edges.length) column.append(document.createElement("br"), "nothing");
  return column;
}

function choose(node) {
  pinned = node;
  for (const other of all(".node, .word", shown)) {
    other.setAttribute("aria-pressed", String(other === node));
    // One stop for Tab among the steps, one among the words; the arrows do the rest.
    if (node && node.matches(".word") === other.matches(".word")) other.tabIndex = other === node ? 0 : -1;
  }
  follow(node);
  tell(node);
}

function neighbour(node, key) {
  const lane = node.matches(".word") ? all(".word", shown) : all(".node", node.closest(".lane"));
  const i = lane.indexOf(node);
  if (key === "ArrowRight") return lane[i + 1];
  if (key === "ArrowLeft") return lane[i - 1];
  if (key === "Home") return lane[0];
  if (key === "End") return lane[lane.length - 1];
  if (node.matches(".word")) return null;
  const lanes = all(".lane", shown).map((other) => all(".node", other)).filter((nodes) => nodes.length);
  const other = lanes[lanes.findIndex((nodes) => nodes[0] === lane[0]) + (key === "ArrowDown" ? 1 : -1)];
  return other && other[Math.min(i, other.length - 1)];
}

document.addEventListener("keydown", (event) => {
  if (!shown) return;
  if (event.key === "Escape") return choose(null);
  const node = event.target.closest(".node, .word");
  if (!node || !["ArrowRight", "ArrowLeft", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
  event.preventDefault();
  const next = neighbour(node, event.key);
  if (next) { choose(next); next.focus(); }
});
document.addEventListener("click", (event) => {
  const node = event.target.closest(".node, .word");
  if (node) choose(node === pinned ? null : node);
});
document.addEventListener("mouseover", (event) => {
  const node = event.target.closest(".node, .word");
  if (shown) follow(node || pinned);
});
document.addEventListener("focusin", (event) => {
  if (event.target.matches(":is(.node, .word):focus-visible") && event.target !== pinned) choose(event.target);
});

// Which dream, which edges, and the records themselves.

function show(number) {
  if (!dreams[number]) return;
  if (shown) choose(null);
  shown = dreams[number];
  dreams.forEach((dream) => { dream.hidden = dream !== shown; });
  if (one("#picker")) one("#picker").value = String(number);
  draw();
}

function fromAddress() {
  const found = /^#dream-(\d+)$/.exec(location.hash);
  show(found ? Number(found[1]) - 1 : 0);
}

one("#picker")?.addEventListener("change", (event) => { location.hash = `dream-${Number(event.target.value) + 1}`; });
addEventListener("hashchange", fromAddress);
for (const id of ["temporal", "causal", "least"]) one(`#${id}`).addEventListener("input", draw);
one("#save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([one("#records").textContent], { type: "application/json" }));
  link.download = "dreams.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});
const sizes = new ResizeObserver(draw);
all(".board").forEach((board) => sizes.observe(board));
fromAddress();
