// The page: one query at a time, by id in the address (#id=17) or as a file, and the corpus to pick from.

import { neighbourStrip, queryStrip } from "/bits.js";

const $ = (id) => document.getElementById(id);
const GALLERY_STEP = 60;
const PATIENCE = 250; // milliseconds after the last key before a filter is sent

const state = { index: null, query: null, running: null, gallery: { next: null, running: null } };

// --- talking to the server ------------------------------------------------------------------------------------------

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is  admth-run browse  still running?");
  }
  const answer = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

/** The bytes of a file; a folder, or a file that is gone by now, cannot be read. */
async function contentOf(file) {
  try {
    return await file.arrayBuffer();
  } catch {
    throw new Error(`${file.name} cannot be read: is it a folder, or gone?`);
  }
}

function show(error) {
  if (error.name === "AbortError") return;
  $("error").hidden = false;
  $("error").firstElementChild.textContent = error.message;
}

// --- small pieces ---------------------------------------------------------------------------------------------------

function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  const { data, aria, ...plain } = properties;
  Object.assign(node, plain);
  Object.assign(node.dataset, data ?? {});
  for (const [key, value] of Object.entries(aria ?? {})) node.setAttribute(`aria-${key}`, value);
  node.append(...children);
  return node;
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const shortPath = (uri) => uri.split("/").filter(Boolean).slice(-2).join("/");
const milliseconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(0)} ms`;

function thumbnail(image) {
  const node = make("img", { loading: "lazy", decoding: "async", alt: image.uri, title: image.uri });
  node.addEventListener("load", () => node.classList.toggle("pixelated", node.naturalWidth < 64));
  node.src = `/thumbnails/${image.id}?v=${state.index.version}`;
  return node;
}

// --- the query ------------------------------------------------------------------------------------------------------

function settings() {
  return new URLSearchParams({ k: $("k").value, filter: $("filter").value.trim(), rerank: $("rerank").value });
}

async function search(query) {
  state.running?.abort();
  const running = (state.running = new AbortController());
  $("columns").classList.add("loading");
  $("results").setAttribute("aria-busy", "true");
  $("status").textContent = "searching";
  try {
    const parameters = settings();
    let answer;
    if (query.file) {
      if (query.file.size > state.index.upload_limit) {
        throw new Error(`${query.file.name} is larger than ${state.index.upload_limit >> 20} MiB, the limit of an upload`);
      }
      parameters.set("name", query.file.name);
      answer = await ask(`/api/search?${parameters}`, {
        method: "POST",
        headers: { "Content-Type": "application/octet-stream" },
        body: await contentOf(query.file),
        signal: running.signal,
      });
    } else {
      parameters.set("id", query.id);
      answer = await ask(`/api/search?${parameters}`, { signal: running.signal });
    }
    state.query = query;
    $("error").hidden = true;
    showQuery(answer);
    showColumns(answer);
    markPicked();
  } catch (error) {
    show(error);
  } finally {
    if (state.running === running) {
      $("columns").classList.remove("loading");
      $("results").setAttribute("aria-busy", "false");
    }
  }
}

function showQuery({ query, milliseconds: times, results }) {
  const preview = $("preview");
  preview.hidden = !query.preview;
  if (query.preview) preview.src = query.preview;
  preview.alt = `the query, ${query.name}`;
  preview.classList.toggle("pixelated", query.width !== null && Math.max(query.width, query.height) < 160);
  $("drop").classList.add("filled");
  $("query-name").textContent = query.width ? `${query.name} (${query.width}×${query.height})` : query.name;
  $("query-note").hidden = !query.note;
  $("query-note").textContent = query.note ?? "";
  const rows = Object.entries(times);
  const searching = results.reduce((sum, column) => sum + column.milliseconds, 0);
  rows.push([`search, ${plural(results.length, "length")}`, searching]);
  const total = rows.reduce((sum, [, value]) => sum + value, 0);
  $("times").replaceChildren(
    ...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: milliseconds(value) })]),
    make("dt", { textContent: "together", className: "total" }),
    make("dd", { textContent: milliseconds(total), className: "total" }),
  );
  $("codes").replaceChildren(
    ...query.codes.map((code) =>
      make("div", { className: "code", data: { length: code.length } },
        make("p", {}, make("span", { textContent: `${code.length} bits` }), make("code", { textContent: code.hex })),
        queryStrip(code.hex, code.margins)),
    ),
  );
  $("query-facts").hidden = false;
}

function showColumns({ query, results, filter, searched }) {
  $("empty").hidden = true;
  $("difference-legend").hidden = false;
  const codes = new Map(query.codes.map((code) => [code.length, code.hex]));
  $("columns").replaceChildren(...results.map((column) => oneColumn(column, codes.get(column.length), query.id)));
  const among = filter ? `${plural(searched, "image")} whose path contains “${filter}”` : plural(searched, "image");
  $("results-title").textContent = `Nearest of ${among}`;
  if (searched === 0) {
    $("empty").hidden = false;
    $("empty").firstElementChild.textContent = `No image's path contains “${filter}”.`;
  }
  $("status").textContent = `${plural(results[0]?.neighbours.length ?? 0, "neighbour")} at each of ${plural(results.length, "code length")}`;
}

function oneColumn({ length, milliseconds: time, neighbours }, queryHex, queryId) {
  const list = make("ol", { data: { length } }, ...neighbours.map((hit) => oneHit(hit, queryHex, queryId)));
  return make("div", { className: "column" },
    make("h3", {}, `${length} bits`, make("span", { textContent: milliseconds(time), title: "time of the search at this length" })), list);
}

function oneHit(hit, queryHex, queryId) {
  const itself = hit.id === queryId;
  const use = make("button", { type: "button", className: "use", textContent: itself ? "the query" : "use as query", disabled: itself });
  use.setAttribute("aria-label", `use ${hit.uri} as query`);
  use.addEventListener("click", () => pick(hit.id));
  const image = thumbnail(hit);
  if (!itself) image.addEventListener("click", () => pick(hit.id));
  const item = make("li", { className: "hit", data: { id: hit.id } },
    image,
    make("p", { className: "distance" }, distanceOf(hit), use),
    make("p", { className: "path", textContent: shortPath(hit.uri), title: hit.uri }),
    neighbourStrip(hit.hex, queryHex));
  for (const [event, on] of [["mouseenter", true], ["mouseleave", false], ["focusin", true], ["focusout", false]]) {
    item.addEventListener(event, () => markEqual(hit.id, on));
  }
  return item;
}

function distanceOf(hit) {
  const text = make("b", { textContent: plural(hit.distance, "bit") });
  if (hit.score !== undefined) text.title = `ordered by the logits' score, ${hit.score}`;
  return text;
}

function markEqual(id, on) {
  for (const item of $("columns").querySelectorAll(`[data-id="${id}"]`)) item.classList.toggle("same", on);
}

/** Search with an image of the corpus; the address keeps its id, so that going back works. */
function pick(id) {
  const address = `#id=${id}`;
  if (location.hash === address) search({ id });
  else location.hash = address;
  window.scrollTo({ top: 0 });
}

function pickFile(file) {
  if (!file) return;
  history.pushState(null, "", location.pathname);
  search({ file });
  window.scrollTo({ top: 0 });
}

function searchAddress() {
  const id = new URLSearchParams(location.hash.slice(1)).get("id");
  if (id !== null) search({ id });
}

// --- the corpus -----------------------------------------------------------------------------------------------------

async function loadGallery(more) {
  state.gallery.running?.abort();
  const running = (state.gallery.running = new AbortController());
  const filter = $("corpus-filter").value.trim();
  const parameters = new URLSearchParams({ filter, limit: GALLERY_STEP });
  if (more && state.gallery.next !== null) parameters.set("after", state.gallery.next);
  try {
    const { images, next, looked_at: lookedAt } = await ask(`/api/images?${parameters}`, { signal: running.signal });
    if (!more) $("gallery").replaceChildren();
    $("gallery").append(...images.map(galleryItem));
    state.gallery.next = next;
    $("more").hidden = next === null;
    const none = $("gallery").childElementCount === 0;
    $("gallery-note").hidden = !none;
    $("gallery-note").textContent = next === null
      ? `No image's path contains “${filter}”.`
      : `None of the first ${plural(lookedAt, "image")} has “${filter}” in its path: show more to look on.`;
    markPicked();
  } catch (error) {
    show(error);
  }
}

function galleryItem(image) {
  const button = make("button", { type: "button", data: { id: image.id } }, thumbnail(image));
  button.addEventListener("click", () => pick(image.id));
  return make("li", {}, button);
}

function markPicked() {
  for (const button of $("gallery").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", String(button.dataset.id === state.query?.id));
  }
}

// --- events ---------------------------------------------------------------------------------------------------------

function later(action) {
  let timer;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, PATIENCE);
  };
}

function listen() {
  const again = () => state.query && search(state.query);
  $("k").addEventListener("change", again);
  $("rerank").addEventListener("change", again);
  $("filter").addEventListener("input", later(again));
  $("corpus-filter").addEventListener("input", later(() => loadGallery(false)));
  for (const form of ["controls", "corpus-form"]) $(form).addEventListener("submit", (event) => event.preventDefault());
  $("more").addEventListener("click", () => loadGallery(true));
  $("file").addEventListener("change", () => {
    pickFile($("file").files[0]);
    $("file").value = ""; // so that the same file can be chosen again
  });
  $("error").lastElementChild.addEventListener("click", () => ($("error").hidden = true));
  window.addEventListener("hashchange", searchAddress);
  window.addEventListener("paste", (event) => pickFile(event.clipboardData?.files[0]));
  const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
  window.addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("overlay").hidden = false;
  });
  window.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) $("overlay").hidden = true;
  });
  window.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    $("overlay").hidden = true;
    pickFile(event.dataTransfer.files[0]);
  });
}

async function start() {
  listen();
  try {
    state.index = await ask("/api/index");
    const { images, code_lengths: lengths, model, engine, device } = state.index;
    $("facts").textContent = `${plural(images, "image")} · ${lengths.join(", ")} bits · ${model} on ${engine}, ${device}`;
    await loadGallery(false);
    searchAddress();
  } catch (error) {
    show(error);
  }
}

start();
