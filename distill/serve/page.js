"use strict";
// The chat: Ollama's API of the same address, and /feedback. All text goes in as text, never as HTML.

const LENSES = ["spatial", "temporal", "causal", "abstract"];
const LIKELY = 12; // tokens asked for in each place of a dream
const one = (selector, root = document) => root.querySelector(selector);
const short = (name) => name.replace(/:latest$/, "");
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
let students = []; // as /api/tags tells of them
let token = sessionStorage.getItem("token") || "";
let pictures = []; // data: URLs to be sent
let writing = 0; // replies that are being written
const turns = []; // {question, pictures, replies}
const labels = new Map(); // student → its image tokens

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

// The server.

async function call(path, body, signal) {
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  let answer;
  try {
    answer = await fetch(path, { signal, headers, ...(body && { method: "POST", body: JSON.stringify(body) }) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server can't be reached; is `dream serve` still running?");
  }
  if (answer.ok) return answer;
  one("#door").hidden = answer.status !== 401;
  const told = await answer.json().catch(() => ({}));
  throw new Error(told.error || `The server said ${answer.status}.`);
}

async function* lines(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", ended = false; !ended; ) {
    const { value = "", done } = await reader.read();
    const found = (rest + value).split("\n");
    rest = found.pop();
    ended = done;
    for (const line of found) yield JSON.parse(line);
  }
}

async function begin() {
  one("#notice").hidden = true;
  try {
    students = (await (await call("api/tags")).json()).models;
    one("#door").hidden = true;
  } catch (error) {
    one("#notice p").textContent = error.message;
    one("#notice").hidden = !one("#door").hidden && !token;
    return;
  }
  const options = () => students.map(({ name }) => make("option", { value: name }, short(name)));
  one("#student").replaceChildren(...options());
  one("#other").replaceChildren(make("option", { value: "" }, "nobody"), ...options());
  one("#other").parentNode.hidden = students.length < 2;
  fits();
}

const can = (name, what) => students.some((student) => student.name === name && student.capabilities.includes(what));
const asked = () => [...new Set([one("#student").value, one("#other").value].filter(Boolean))];

function fits() {
  const sees = asked().some((name) => can(name, "vision"));
  one("#picture").disabled = !sees;
  one(".attach").classList.toggle("off", !sees);
  one(".attach").title = sees ? "Add a picture" : "This student reads no pictures";
  one("#dreams").disabled = !asked().some((name) => can(name, "thinking"));
  one("#send").hidden = !(one("#stop").hidden = !writing);
}

// A reply: {name, turn, asked, dream, answer, ended, was, node}, asked being the conversation as it was then. A dream is a
// list of {label, p, likely, own}.

const written = (dream) => dream.map(({ label }) => `⟨${label}⟩`).join("");

function paths(dream) {
  const found = [];
  for (const place of dream) {
    const last = found.at(-1);
    const isNew = LENSES.includes(place.label) && found.every(({ lens }) => lens !== place.label);
    const opens = isNew && (!last || last.places.length % 3 === 0);
    if (opens) found.push({ lens: place.label, places: [] });
    else last?.places.push(place);
  }
  return found;
}

function before(reply) {
  const found = [];
  for (const turn of turns.slice(0, turns.indexOf(reply.turn))) {
    const said = turn.replies.find((other) => other.name === reply.name && other.ended);
    if (said) found.push(question(turn), { role: "assistant", content: said.answer });
  }
  return [...found, question(reply.turn)];
}

function question({ question: content, pictures: shown }) {
  return { role: "user", content, ...(shown.length && { images: shown.map((url) => url.slice(url.indexOf(",") + 1)) }) };
}

async function ask(reply, dream) {
  reply.own = Boolean(dream);
  if (!dream || reply.ended) reply.was = dream ? reply.answer : null;
  Object.assign(reply, { dream: dream || [], answer: "", ended: null, error: "", stop: new AbortController() });
  writing += 1;
  fits();
  show(reply);
  reply.asked = before(reply);
  const messages = [...reply.asked];
  const thinks = dream ? dream.some(({ label }) => !LENSES.includes(label)) : one("#dreams").checked;
  if (dream && thinks) messages.push({ role: "assistant", content: "", thinking: written(dream) });
  const options = { temperature: Number(one("#temperature").value), seed: 0 };
  const body = { model: reply.name, messages, logprobs: true, top_logprobs: LIKELY, options };
  if (!thinks) body.think = false;
  try {
    for await (const piece of lines(await call("api/chat", body, reply.stop.signal))) {
      if (piece.error) throw new Error(piece.error);
      hear(reply, piece);
    }
    if (!reply.ended) throw new Error("The answer broke off; did the server stop?");
  } catch (error) {
    reply.error = error.name === "AbortError" ? "Stopped; this answer is forgotten." : error.message;
  }
  writing -= 1;
  fits();
  show(reply);
}

function hear(reply, piece) {
  if (piece.done) reply.ended = piece;
  const { thinking, content } = piece.message;
  if (thinking) {
    const { logprob, top_logprobs: others } = piece.logprobs[0];
    const likely = others.map(({ token: text, logprob: value }) => ({ label: text.slice(1, -1), p: Math.exp(value), text }));
    reply.dream.push({ label: thinking.slice(1, -1), p: Math.exp(logprob), likely: likely.filter(({ text }) => /^⟨.*⟩$/.test(text)) });
    put(reply.node, () => one(".dreamt", reply.node).replaceWith(drawn(reply)));
  }
  reply.answer += content;
  one(".said", reply.node).append(content);
  follow();
}

function follow() {
  const page = document.documentElement;
  if (page.scrollHeight - page.clientHeight - page.scrollTop < 160) page.scrollTop = page.scrollHeight;
}

// How it looks.

function drawn(reply) {
  const lanes = paths(reply.dream).map(({ lens, places }) => {
    const steps = [];
    for (let i = 0; i < places.length; i += 3) {
      const slots = places.slice(i, i + 3).map((place, role) => slot(reply, lens, i / 3, role, place));
      steps.push(make("div", { class: "step" }, ...slots));
    }
    const path = steps.length ? steps : [make("p", { class: "none" }, "nothing dreamed")];
    const heading = make("h3", {}, lens);
    return make("div", { class: "lane", "data-lens": lens, role: "group", "aria-label": lens }, heading, make("div", { class: "path" }, ...path));
  });
  const dreamt = make("div", { class: "dreamt", keydown: walk }, ...lanes);
  at(one(".slot", dreamt));
  return dreamt;
}

// One token of a dream is a stop for Tab; the arrows lead to the others.
function at(slot) {
  if (slot) all(".slot", slot.closest(".dreamt")).forEach((other) => { other.tabIndex = other === slot ? 0 : -1; });
}

// Draw anew; the focus stays in its place.
function put(node, draw) {
  const [focused, slots] = [document.activeElement, all(".slot", node)];
  const inside = node.contains(focused);
  draw();
  if (!inside || node.contains(document.activeElement)) return;
  const now = all(".slot", node);
  const next = now[Math.min(slots.indexOf(focused), now.length - 1)] || node;
  if (next !== node) at(next);
  next.focus();
}

function slot(reply, lens, step, role, place) {
  const sure = place.own ? "yours" : `${Math.round(100 * place.p)} %`;
  const what = ["what", "action", "result"][role];
  const told = `${place.label}, ${sure}: ${what} of step ${step + 1}, ${lens}; change it`;
  const label = make("span", { class: "label" }, place.label);
  const click = () => change(reply, place, `${lens}, step ${step + 1}, ${what}`);
  const button = make("button", { type: "button", class: "slot", "aria-label": told, title: `${what}, ${sure}`, tabindex: "-1", click }, label);
  button.classList.toggle("own", Boolean(place.own));
  button.style.setProperty("--p", place.own ? 1 : place.p.toFixed(4));
  return button;
}

function walk(event) {
  const slots = all(".slot", event.currentTarget);
  const here = slots.indexOf(event.target);
  const next = { ArrowRight: slots[here + 1], ArrowLeft: slots[here - 1], Home: slots[0], End: slots.at(-1) }[event.key];
  if (!next || here < 0) return;
  event.preventDefault();
  at(next);
  next.focus();
}

function show(reply) {
  const { node, ended, error } = reply, changed = ended && reply.was !== null;
  const parts = [make("h2", {}, short(reply.name)), drawn(reply)];
  parts.push(make("p", { class: "said" }, ...(changed ? marked(reply.was, reply.answer) : [reply.answer])));
  if (changed) parts.push(make("p", { class: "facts" }, reply.was === reply.answer ? "The same answer as before." : `Before: ${reply.was}`));
  if (error) parts.push(make("p", { class: "error", role: "alert" }, error));
  if (ended) parts.push(make("p", { class: "facts" }, facts(ended)));
  if (ended || error) parts.push(actions(reply));
  node.setAttribute("aria-busy", String(!ended && !error));
  put(node, () => node.replaceChildren(...parts));
  follow();
}

function facts(ended) {
  const [seconds, cut] = [(ended.prompt_eval_duration + ended.eval_duration) / 1e9, ended.done_reason === "length"];
  const told = `${ended.eval_count} tokens in ${seconds.toFixed(2)} s${cut ? ", then there was no more room" : ""}`;
  return [told, ...(ended.notes || [])].join("; ");
}

// The words of `now`, those marked that are not of the longest common subsequence with `was`.
function marked(was, now) {
  const [a, b] = [was, now].map((text) => text.match(/\s*\S+/g) || []);
  const most = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      most[i][j] = a[i] === b[j] ? most[i + 1][j + 1] + 1 : Math.max(most[i + 1][j], most[i][j + 1]);
  const found = [];
  for (let i = 0, j = 0; j < b.length; ) {
    if (a[i] === b[j]) found.push(b[j++]), i++;
    else if (i < a.length && most[i + 1][j] >= most[i][j + 1]) i++;
    else found.push(make("mark", {}, b[j++]));
  }
  return found;
}

function actions(reply) {
  const bar = make("div", { class: "actions" });
  const button = (text, click) => bar.append(make("button", { type: "button", click }, text));
  if (reply.error) button("Try again", () => ask(reply, reply.own && reply.dream));
  else if (can(reply.name, "feedback")) {
    const thumb = (verdict) => (event) => keep(reply, verdict, "", event.currentTarget);
    button("Good", thumb("good"));
    button("Bad", thumb("bad"));
    button("Better…", (event) => say(reply, event.currentTarget));
  } else bar.append(make("span", { class: "facts" }, "A bundle keeps no feedback; serve the run to teach it."));
  if (reply.own) button("Its own dream", () => ask(reply));
  return bar;
}

// Thumbs: a line of the run's feedback each.

async function keep(reply, verdict, better, button) {
  const bar = button.parentNode;
  const told = make("span", { class: "facts", role: "status" });
  all("[role]", bar).forEach((old) => old.remove());
  bar.append(told);
  try {
    const said = { thinking: written(reply.dream), content: reply.answer, done_reason: reply.ended.done_reason, verdict, better };
    await call("feedback", { model: reply.name, messages: reply.asked, ...said });
    all("button", bar).slice(0, 3).forEach((each) => each.toggleAttribute("disabled", true));
    button.setAttribute("aria-pressed", "true");
    told.textContent = `kept; \`dream learn ${short(reply.name)}\` learns from it`;
  } catch (error) {
    told.className = "error";
    told.textContent = error.message;
  }
}

function say(reply, button) {
  const dialog = one("#better");
  const text = one("textarea", dialog);
  text.value = reply.answer.trim();
  one("form", dialog).onsubmit = (event) => {
    event.preventDefault();
    if (!text.value.trim()) return;
    dialog.close();
    keep(reply, "better", text.value.trim(), button);
  };
  dialog.showModal();
}

// A token of a dream, changed.

async function change(reply, place, where) {
  if (!reply.ended) return;
  const dialog = one("#change");
  const [field, error] = [one("#label"), one(".error", dialog)];
  one("#change-title").textContent = `⟨${place.label}⟩: ${where}`;
  field.value = error.textContent = "";
  const others = (place.likely || []).filter(({ label }) => label !== place.label && !LENSES.includes(label)).slice(0, 6);
  one("#likely").replaceChildren(...others.map(({ label, p }) =>
    make("button", { type: "button", click: () => instead(label) }, label, make("span", {}, `${(100 * p).toFixed(1)} %`))));
  const again = (dream) => {
    dialog.close();
    ask(reply, dream);
  };
  const instead = (label) => again(reply.dream.map((other) => (other === place ? { label, own: true, likely: place.likely } : other)));
  const known = () => labels.get(reply.name) || [];
  one("form", dialog).onsubmit = (event) => {
    event.preventDefault();
    const label = field.value.trim().replace(/^⟨|⟩$/g, "");
    if (known().includes(label)) instead(label);
    else error.textContent = `⟨${label}⟩ is none of this student's ${known().length} tokens; choose one of the list.`;
  };
  one("#drop").onclick = () => {
    const path = paths(reply.dream).find(({ places }) => places.includes(place)).places;
    const first = path.indexOf(place) - (path.indexOf(place) % 3);
    again(reply.dream.filter((other) => !path.slice(first, first + 3).includes(other)));
  };
  dialog.showModal();
  if (!labels.has(reply.name)) {
    try {
      const told = await (await call("api/show", { model: reply.name, verbose: true })).json();
      const found = told.model_info["tokenizer.ggml.tokens"].filter((text) => /^⟨.*⟩$/s.test(text)).map((text) => text.slice(1, -1));
      labels.set(reply.name, found.filter((label) => !LENSES.includes(label)));
    } catch (problem) {
      error.textContent = problem.message;
    }
  }
  one("#labels").replaceChildren(...known().map((label) => make("option", { value: label })));
}

// What is asked.

function send() {
  const field = one("#question");
  if (!field.value.trim() || writing || !students.length) return;
  const turn = { question: field.value.trim(), pictures, replies: [] };
  const shown = pictures.map((url, i) => make("img", { src: url, alt: `picture ${i + 1}` }));
  const said = make("div", { class: "question" }, ...shown, make("p", {}, turn.question));
  const replies = make("div", { class: "replies" });
  turn.replies = asked().map((name) => ({ name, turn, node: make("article", { class: "reply", tabindex: "-1", "aria-live": "polite", "aria-label": `Answer of ${name}` }) }));
  replies.append(...turn.replies.map(({ node }) => node));
  one("#turns").append(make("section", { class: "turn" }, said, replies));
  turns.push(turn);
  one("#hint").hidden = true;
  field.value = "";
  pictures = [];
  held();
  document.documentElement.scrollTop = document.documentElement.scrollHeight;
  turn.replies.forEach((reply) => ask(reply));
}

const stop = () => turns.flatMap((turn) => turn.replies).forEach((reply) => reply.stop.abort());

function held() {
  one("#pictures").replaceChildren(...pictures.map((url, i) => make("li", {}, make("img", { src: url, alt: `picture ${i + 1}` }),
    make("button", { type: "button", "aria-label": `Remove picture ${i + 1}`, click: () => { pictures.splice(i, 1); held(); } }, "×"))));
}

function add(files) {
  for (const file of files) {
    if (one("#picture").disabled || !file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => { pictures.push(reader.result); held(); };
    reader.readAsDataURL(file);
  }
}

one("#ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
one("#question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
});
one("#question").addEventListener("paste", (event) => add(event.clipboardData.files));
one("#picture").addEventListener("change", (event) => { add(event.target.files); event.target.value = ""; });
one("#stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && !one("dialog[open]")) stop(); });
for (const id of ["student", "other"]) one(`#${id}`).addEventListener("change", fits);
for (const id of ["leave", "unsaid"]) one(`#${id}`).addEventListener("click", (event) => event.target.closest("dialog").close());
one("#anew").addEventListener("click", () => {
  stop();
  turns.length = 0;
  one("#turns").replaceChildren();
  one("#hint").hidden = false;
  one("#question").focus();
});
one("#notice button").addEventListener("click", begin);
one("#door").addEventListener("submit", (event) => {
  event.preventDefault();
  token = one("#token").value;
  sessionStorage.setItem("token", token);
  begin();
});
begin();
one("#question").focus();
