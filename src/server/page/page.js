// The page: images in, one POST /v1/classify each, answers out. No dependency; every text goes in as text, never as HTML.

/** Requests under way at once: enough to keep a small server busy, too few to fill its queue. */
const AT_ONCE = 4;
/** How often an image that a full server refused is sent again. */
const RETRIES = 4;
/** Phases of the header `server-timing`, and how a person calls them. */
const PHASES = [["decode", "decode"], ["preprocess", "resize"], ["queue", "queue"], ["inference", "inference"]];
/** From so many images on, cards are tiles. */
const MANY = 9;
/** Classes that are listed at once. */
const LISTED = 200;
/** Refusals that another try with the same image and model would only meet again. */
const FINAL = new Set(["unsupported_media_type", "invalid_image", "image_too_large", "body_too_large", "invalid_request", "model_not_found", "unauthenticated"]);
const HEADLINES = {
  unsupported_media_type: "This is not an image that the server can read.",
  invalid_image: "This image is damaged or not an image.",
  image_too_large: "This image has too many pixels.",
  body_too_large: "This file is too large.",
  model_not_found: "The server no longer has this model.",
  overloaded: "The server is busy.",
  deadline_exceeded: "The server took too long.",
  not_ready: "The server is not ready.",
  shutting_down: "The server is stopping.",
  unauthenticated: "The server asks for an API key.",
  internal: "The server failed.",
};

const $ = (id) => document.getElementById(id);
const make = (name, className, text) => {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
};
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const say = (text) => { $("said").textContent = text; };
/** About one image: of many, each would cut the one before off. */
const sayOf = (text) => { if (cards.size < MANY) say(text); };

/** What an answer other than 200 says, whoever made it. */
class Refusal extends Error {
  constructor(message, code, retryAfter) {
    super(message);
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** Forgotten with the tab. */
const key = {
  name: "nfold-api-key",
  get value() { try { return sessionStorage.getItem(this.name) ?? ""; } catch { return this.held ?? ""; } },
  set value(text) { try { sessionStorage.setItem(this.name, text); } catch { this.held = text; } },
};

/** A picture, and the headers beside it. */
async function picture(target, options) {
  const response = await send(target, options);
  if (response.ok) return { blob: await response.blob(), headers: response.headers };
  let json = null;
  try { json = await response.json(); } catch { /* a proxy's page */ }
  throw new Refusal(String(json?.error ?? `the answer was ${response.status}`), json?.code);
}

/** With the key, if there is one. */
function send(target, options = {}) {
  const headers = { ...options.headers, ...(key.value && { authorization: `Bearer ${key.value}` }) };
  return fetch(target, { ...options, headers });
}

async function call(target, options = {}) {
  let response;
  const sent = key.value;
  const headers = { ...options.headers, ...(sent && { authorization: `Bearer ${sent}` }) };
  try {
    response = await fetch(target, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("No answer came back. Is the server running, and can this file still be read?", "network");
  }
  const body = await response.text();
  let json = null;
  try { json = JSON.parse(body); } catch { /* a proxy's page */ }
  if (response.ok && json) return { json, headers: response.headers };
  // an answer to an older key says nothing about a newer one
  if (response.status === 401 && sent === key.value) lock(sent ? "The server does not know this key." : "This server asks for an API key.");
  const after = Number(response.headers.get("retry-after"));
  const message = json?.error ?? `The answer was ${response.status} ${response.statusText}, from something in between.`;
  throw new Refusal(String(message), json?.code ?? `http_${response.status}`, after);
}

/** `decode;dur=1.2, queue;dur=3` → {decode: 1.2, queue: 3}, in milliseconds. */
function timings(header) {
  const found = {};
  for (const part of (header ?? "").split(",")) {
    const match = /^\s*([\w-]+)\s*;.*?dur=([\d.]+)/.exec(part);
    if (match) found[match[1]] = Number(match[2]);
  }
  return found;
}

/** A probability; or a logit, of a model that was folded without a function for scores. */
const share = (score) => (score < 0 || score > 1 ? score.toFixed(3) : percent(score));
const percent = (score) => (score < 0.0005 ? "< 0.1 %" : `${(100 * score).toFixed(1)} %`);
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : ms.toFixed(0)} ms`;
/** A word that a POSIX shell takes as it is. */
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** Where `/v1/classify` is, beside this page: a proxy may have put both under a prefix. */
function target() {
  const url = new URL("v1/classify", document.baseURI);
  const chosen = $("chooser").hidden ? null : $("model").selectedOptions[0];
  if (chosen) {
    url.searchParams.set("model", chosen.dataset.model);
    if (chosen.dataset.version) url.searchParams.set("version", chosen.dataset.version);
  }
  return url;
}

// --- cards -----------------------------------------------------------------------------------------------------------

class Card {
  constructor(file) {
    this.file = file;
    this.name = file.name || "pasted image";
    this.stop = new AbortController();
    this.element = $("card").content.firstElementChild.cloneNode(true);
    this.find = (selector) => this.element.querySelector(selector);
    this.find("h2").textContent = this.name;
    this.find(".remove").setAttribute("aria-label", `remove ${this.name}`);
    this.find(".remove").onclick = () => this.remove(true);
    this.find(".again").onclick = () => { this.find(".again").hidden = true; enqueue([this]); };
    this.find(".copy").onclick = () => this.copy();
    this.find(".thumb").title = this.name;
    this.find(".details").setAttribute("aria-label", `details of ${this.name}`);
    this.find(".details").onclick = () => {
      const open = this.element.classList.toggle("open");
      this.find(".details").setAttribute("aria-expanded", String(open));
    };
    this.find(".where").onclick = () => this.where();
    const picture = this.find(".thumb img");
    this.url = URL.createObjectURL(file);
    picture.onload = () => { picture.hidden = false; };
    picture.src = this.url;
  }

  show(state, text) {
    this.element.dataset.state = state;
    this.find(".state").hidden = !text;
    this.find(".state").textContent = text ?? "";
    progress();
  }

  get isOver() { return ["done", "failed"].includes(this.element.dataset.state); }

  async run() {
    this.find(".again").hidden = true;
    this.show("running", "classifying…");
    const url = target();
    for (let tries = 0; ; tries++) {
      const started = performance.now();
      try {
        const headers = { "content-type": "application/octet-stream" };
        const answer = await call(url, { method: "POST", body: this.file, headers, signal: this.stop.signal });
        return this.answered(answer, performance.now() - started, url);
      } catch (error) {
        if (this.stop.signal.aborted) return;
        if (error.code === "overloaded" && tries < RETRIES) {
          this.show("running", "the server is busy: trying again…");
          await sleep(1000 * Math.max(1, error.retryAfter || 0));
          continue;
        }
        return this.failed(error);
      }
    }
  }

  answered({ json, headers }, total, url) {
    const predictions = json.results?.[0]?.predictions;
    if (!Array.isArray(predictions)) {
      return this.failed(new Refusal("The answer holds no prediction.", "unknown"));
    }
    const list = this.find(".predictions");
    list.replaceChildren(...predictions.map(({ index, label, score }) => {
      const item = make("li");
      const fill = make("span", "fill");
      fill.style.width = `${100 * Math.min(1, Math.max(0, score))}%`;
      fill.ariaHidden = "true";
      item.title = label;
      item.append(fill, make("span", "label", label || `class ${index}`), make("span", "share", share(score)));
      return item;
    }));
    list.setAttribute("aria-label", `${predictions.length} classes, best score first`);
    list.hidden = predictions.length === 0;
    this.times(timings(headers.get("server-timing")), total);
    this.find(".who").textContent = `answered by ${json.model}, version ${json.version}`;
    const shown = key.value ? " -H 'authorization: Bearer KEY'" : "";
    this.find(".curl code").textContent = `curl${shown} --data-binary @${quoted(this.name)} ${quoted(url.href)}`;
    this.find(".curl code").tabIndex = 0;
    this.find(".more").hidden = false;
    const [first] = predictions;
    this.cool();
    if (first && mapped.has(json.model)) {
      this.answer = { model: json.model, version: json.version, index: first.index, label: first.label || `class ${first.index}` };
      this.find(".where").hidden = false;
    }
    this.result = { file: this.name, model: json.model, version: json.version, predictions };
    const none = first ? null : "No class reaches its threshold.";
    this.show("done", none);
    sayOf(`${this.name}: ${none ?? `${first.label || `class ${first.index}`}, ${share(first.score)}`}`);
  }

  /** Server phases, and what is left of the time the browser saw. */
  times(phases, total) {
    const known = PHASES.filter(([name]) => name in phases).map(([name, title]) => [name, title, phases[name]]);
    const rest = Math.max(0, total - known.reduce((sum, [, , ms]) => sum + ms, 0));
    if (known.length > 0) known.push(["rest", "network and rest", rest]);
    this.find(".split").replaceChildren(...known.map(([name, , ms]) => {
      const part = make("span");
      part.dataset.phase = name;
      part.style.flexGrow = ms;
      return part;
    }));
    const rows = known.map(([name, title, ms]) => {
      const row = make("div");
      row.dataset.phase = name;
      row.append(make("dt", "", title), make("dd", "", milliseconds(ms)));
      return row;
    });
    const sum = make("div", "total");
    sum.append(make("dt", "", "in all"), make("dd", "", milliseconds(total)));
    this.find(".times").replaceChildren(...rows, sum);
  }

  failed(error) {
    this.locked = error.code === "unauthenticated";
    const headline = HEADLINES[error.code];
    const detail = error.message.charAt(0).toUpperCase() + error.message.slice(1);
    const text = [headline, detail].filter(Boolean).join("\n");
    this.find(".predictions").hidden = true;
    this.find(".more").hidden = true;
    this.cool();
    this.result = { file: this.name, error: { code: error.code, message: error.message } };
    this.find(".again").hidden = FINAL.has(error.code);
    this.find(".again").setAttribute("aria-label", `try again: ${this.name}`);
    this.show("failed", text);
    sayOf(`${this.name}: ${text}`);
  }

  /** Lays the heat of the most probable class over the image, or takes it away. */
  async where() {
    const [button, figure] = [this.find(".where"), this.find(".heat")];
    const show = (on) => { figure.hidden = !on; button.setAttribute("aria-expanded", String(on)); };
    if (this.heat) return show(figure.hidden);
    button.disabled = true;
    try {
      const url = new URL("v1/explain", document.baseURI);
      url.searchParams.set("model", this.answer.model);
      url.searchParams.set("version", this.answer.version);
      url.searchParams.set("class", this.answer.index);
      const headers = { accept: "image/png", "content-type": "application/octet-stream" };
      const { blob, headers: told } = await picture(url, { method: "POST", body: this.file, headers, signal: this.stop.signal });
      this.heat = URL.createObjectURL(blob);
      const [least, most] = (told.get("x-heat-range") ?? "").split(" ").map((value) => Number(value).toPrecision(2));
      figure.querySelector("img").src = this.heat;
      figure.querySelector("img").alt = `where ${this.name} speaks for ${this.answer.label}: yellow most, dark blue least`;
      figure.querySelector(".least").textContent = least;
      figure.querySelector(".most").textContent = `${most} for ${this.answer.label}`;
      show(true);
      say(`${this.name}: the heat for ${this.answer.label} is shown`);
    } catch (error) {
      if (!this.stop.signal.aborted) say(`${this.name}: ${error.message}`);
      button.textContent = `where? ${error.message}`;
    }
    button.disabled = false;
  }

  /** Forgets the heat of an earlier answer. */
  cool() {
    if (this.heat) URL.revokeObjectURL(this.heat);
    this.heat = null;
    this.find(".heat").hidden = true;
    this.find(".where").hidden = true;
    this.find(".where").textContent = "where?";
    this.find(".where").setAttribute("aria-expanded", "false");
  }

  async copy() {
    const code = this.find(".curl code");
    const button = this.find(".copy");
    let copied = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // without https only the old way works
      getSelection().selectAllChildren(code);
      copied = document.execCommand("copy");
    }
    button.textContent = copied ? "copied" : "selected";
    say(copied ? "command copied" : "command selected, copy it with the keyboard");
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  }

  remove(alone) {
    this.stop.abort();
    URL.revokeObjectURL(this.url);
    this.cool();
    const next = this.element.nextElementSibling ?? this.element.previousElementSibling;
    this.element.remove();
    cards.delete(this);
    if (alone) (next?.querySelector(".remove") ?? $("files")).focus();
    arrange();
    progress();
  }
}

/** Models that can say where they see what they see. */
const mapped = new Set();
const cards = new Set();
const queue = [];
let running = 0;

/** As many images as there are decide how much is shown of each. */
function arrange() {
  $("results").classList.toggle("compact", cards.size >= MANY);
  $("all").hidden = cards.size === 0;
}

/** How far the images are that are under way; said once, when many are through. */
function progress() {
  const over = [...cards].filter((card) => card.isOver).length;
  const isBusy = over < cards.size;
  $("progress").hidden = !isBusy || cards.size < 2;
  const bar = document.querySelector("#progress progress");
  bar.max = Math.max(1, cards.size);
  bar.value = over;
  $("count").textContent = `${over} of ${cards.size}`;
  for (const id of ["csv", "json"]) $(id).disabled = over === 0;
  if (wasBusy && !isBusy && cards.size >= MANY) {
    const failed = [...cards].filter((card) => card.element.dataset.state === "failed").length;
    say(`${over} images are through, ${failed} of them failed`);
  }
  wasBusy = isBusy;
}
let wasBusy = false;

function enqueue(some) {
  for (const card of some) card.show("waiting", "waiting…");
  queue.push(...some);
  while (running < AT_ONCE && queue.length > 0) {
    running++;
    work();
  }
}

async function work() {
  for (let card; (card = queue.shift()); ) {
    if (!card.stop.signal.aborted) await card.run();
  }
  running--;
}

/** New images, above the earlier ones. */
function take(files) {
  refuse(null);
  const some = [...files].map((file) => new Card(file));
  if (some.length === 0) return;
  $("results").prepend(...some.map((card) => card.element));
  for (const card of some) cards.add(card);
  arrange();
  say(some.length === 1 ? `classifying ${some[0].name}` : `classifying ${some.length} images`);
  enqueue(some);
}

function refuse(text) {
  $("refused").hidden = !text;
  $("refused").textContent = text ?? "";
}

// --- ways in ---------------------------------------------------------------------------------------------------------

$("files").onchange = () => {
  take($("files").files);
  // the same file may be chosen again
  $("files").value = "";
};
$("clear").onclick = () => {
  for (const card of [...cards]) card.remove(false);
  say("all removed");
  $("files").focus();
};

$("sample").onclick = async () => {
  try {
    const response = await fetch(new URL("page/sample.jpg", document.baseURI));
    if (!response.ok) throw new Error(`the answer was ${response.status}`);
    take([new File([await response.blob()], "sample.jpg", { type: "image/jpeg" })]);
  } catch (error) {
    refuse(`The sample did not come: ${error.message}.`);
  }
};

// --- what was found, as files ----------------------------------------------------------------------------------------

/** Images in the order of the page, those that are through. */
function results() {
  const shown = [...$("results").children];
  const order = (card) => shown.indexOf(card.element);
  return [...cards].filter((card) => card.isOver && card.result).sort((a, b) => order(a) - order(b)).map((card) => card.result);
}

/** A cell; what a spreadsheet would take for a formula begins with an apostrophe. */
function cell(value) {
  const text = typeof value === "string" && /^[=+\-@\t]/.test(value) ? `'${value}` : String(value ?? "");
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function csv() {
  const rows = [["file", "model", "version", "rank", "index", "label", "score", "error"]];
  for (const { file, model, version, predictions, error } of results()) {
    if (error) rows.push([file, "", "", "", "", "", "", `${error.code}: ${error.message}`]);
    for (const [i, { index, label, score }] of (predictions ?? []).entries()) rows.push([file, model, version, i + 1, index, label, score, ""]);
  }
  return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
}

function save(name, kind, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  say(`${name} is saved`);
}
$("csv").onclick = () => save("classes.csv", "text/csv", csv());
$("json").onclick = () => save("classes.json", "application/json", `${JSON.stringify(results(), null, 2)}\n`);

// --- ways in, continued: dropped and pasted --------------------------------------------------------------------------

let depth = 0;
const over = (delta) => {
  depth = delta === 0 ? 0 : Math.max(0, depth + delta);
  $("zone").classList.toggle("over", depth > 0);
};
addEventListener("dragenter", (event) => { event.preventDefault(); over(1); });
addEventListener("dragleave", () => over(-1));
// dropped beside the zone, an image would replace the page
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault();
  over(0);
  const items = [...event.dataTransfer.items].filter((item) => item.kind === "file");
  const folders = items.some((item) => item.webkitGetAsEntry?.()?.isDirectory);
  if (folders) return refuse("That is a folder. Drop the images in it, or use nfold classify --recursive.");
  if (event.dataTransfer.files.length === 0) return refuse("That is no file. Save the image first, then drop the file.");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => {
  const files = event.clipboardData?.files ?? [];
  if (files.length > 0) {
    event.preventDefault();
    take(files);
  } else {
    refuse("There is no image to paste. Copy an image, not its address or file name.");
  }
});

// --- API key ---------------------------------------------------------------------------------------------------------

function lock(text) {
  $("lock").hidden = !text;
  $("lock-help").textContent = text ?? "";
}
$("lock").onsubmit = (event) => {
  event.preventDefault();
  const text = $("key").value.trim();
  // other characters can't be sent
  if (!/^[\x21-\x7e]+$/.test(text)) return lock("A key is letters, digits and signs without spaces.");
  key.value = text;
  $("key").value = "";
  lock(null);
  models();
  enqueue([...cards].filter((card) => card.locked && card.element.dataset.state === "failed"));
  $("files").focus();
};

// --- the server ------------------------------------------------------------------------------------------------------

async function health() {
  const shown = $("health");
  const tell = (state, text) => {
    // said once, not every time it is asked
    if (shown.textContent === text) return;
    shown.dataset.state = state;
    shown.textContent = text;
  };
  try {
    await call(new URL("v2/health/ready", document.baseURI));
    tell("ready", "server ready");
  } catch (error) {
    tell("down", error.code === "network" ? "server does not answer" : "server not ready");
  }
}

/** Fills the chooser; a server that can't list its models picks one itself, and says in its answer which. */
async function models() {
  let names = [];
  try {
    const { json } = await call(new URL("v2/models", document.baseURI));
    names = (json.models ?? []).map((model) => model?.name ?? model).filter((name) => typeof name === "string");
  } catch { /* no list, no chooser */ }
  const options = (await Promise.all(names.map(async (name) => {
    let versions = [];
    try {
      const { json } = await call(new URL(`v2/models/${encodeURIComponent(name)}`, document.baseURI));
      versions = (json.versions ?? []).map(String).sort((a, b) => b - a);
      if ((json.outputs ?? []).some((output) => output?.name === "map")) mapped.add(name);
    } catch { /* the name alone will do */ }
    const newest = [name, versions.length > 1 ? `${name}, newest` : name, ""];
    return [newest, ...(versions.length > 1 ? versions.map((v) => [name, `${name}, version ${v}`, v]) : [])];
  }))).flat();
  $("model").replaceChildren(...options.map(([name, title, version]) => {
    const option = make("option", "", title);
    Object.assign(option.dataset, { model: name, version });
    return option;
  }));
  $("chooser").hidden = options.length === 0;
  classes();
}

/** The classes that the chosen model knows. */
async function classes() {
  const url = new URL("v1/classes", document.baseURI);
  url.search = target().search;
  try {
    const { json } = await call(url);
    known = json.classes.map(String);
  } catch { known = []; }
  $("classes").hidden = known.length === 0;
  document.querySelector("#classes summary").textContent = `the ${known.length.toLocaleString("en")} classes that this model knows`;
  list();
}
let known = [];

function list() {
  const wanted = $("filter").value.trim().toLowerCase();
  const found = known.filter((label) => label.toLowerCase().includes(wanted));
  document.querySelector("#classes ul").replaceChildren(...found.slice(0, LISTED).map((label) => make("li", "", label)));
  const more = found.length - LISTED;
  document.querySelector("#classes > p").textContent = found.length === 0 ? "none like that" : more > 0 ? `and ${more.toLocaleString("en")} more` : "";
}
$("filter").oninput = list;

$("model").onchange = () => { classes(); again(); };
const again = () => enqueue([...cards].filter((card) => ["done", "failed"].includes(card.element.dataset.state)));

models();
health();
setInterval(() => { if (!document.hidden) health(); }, 10_000);
