// The page: what is asked stands in its address, so that back, forward and bookmarks work. Pictures that were added stay
// in memory only. Everything that comes from the index is set as text, never as HTML.

const PAGE = 30;
const COLLAPSE = 0.95; // cosine from which two results count as near-duplicates
const DIVERSITY = 0.4;
const element = (id) => document.getElementById(id);
const [form, text, where, weight, diverse, collapse, file, grid, more, status] =
  ["search", "text", "where", "weight", "diverse", "collapse", "file", "grid", "more", "status"].map(element);
const pictures = new Map(); // number in the address → File or Blob
let about = { limits: { k: 1000, body_bytes: Infinity }, examples: [] };
let asking = null; // AbortController of the search in progress

// ---------------------------------------------------------------------------------------------- what is asked

function read() {
  const given = new URLSearchParams(location.search);
  const number = (name, otherwise) => (given.has(name) && Number.isFinite(+given.get(name)) ? +given.get(name) : otherwise);
  return {
    q: given.get("q") ?? "",
    where: given.get("where") ?? "",
    like: given.has("like") ? number("like", null) : null,
    picture: given.has("picture") ? number("picture", null) : null,
    weight: Math.min(1, Math.max(0, number("weight", 0.5))),
    diverse: given.has("diverse"),
    collapse: given.has("collapse"),
    k: Math.max(1, Math.round(number("k", PAGE))),
  };
}

function address(state) {
  const shown = new URLSearchParams();
  if (state.q) shown.set("q", state.q);
  if (state.like !== null) shown.set("like", state.like);
  if (state.picture !== null) shown.set("picture", state.picture);
  if (state.where) shown.set("where", state.where);
  if (state.q && hasPicture(state) && state.weight !== 0.5) shown.set("weight", state.weight);
  if (state.diverse) shown.set("diverse", "1");
  if (state.collapse) shown.set("collapse", "1");
  if (state.k !== PAGE) shown.set("k", state.k);
  return shown.size ? `?${shown}` : location.pathname;
}

const hasPicture = (state) => state.like !== null || state.picture !== null;

function go(changes, replace = false) {
  const state = { ...read(), k: PAGE, ...changes };
  const next = address(state);
  const same = new URL(next, location.href).href === location.href; // Enter in "Only where" changes, then submits
  if (replace || same) history.replaceState(null, "", next);
  else history.pushState(null, "", next);
  return show(state);
}

function typed() {
  return { q: text.value.trim(), where: where.value.trim() };
}

// ---------------------------------------------------------------------------------------------- asking

class Problem extends Error {
  constructor(what, remedy, again = false) {
    super(what);
    this.remedy = remedy;
    this.again = again; // whether the same request may do better later
  }
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem("The server does not answer", "See whether `fusion serve` still runs, then try again.", true);
  }
  if (response.status === 401) logIn();
  if (response.ok) return response;
  const told = await response.json().catch(() => ({ error: `The server answered ${response.status}`, remedy: "Try again." }));
  throw new Problem(told.error, `${told.remedy[0].toUpperCase()}${told.remedy.slice(1)}.`, response.status >= 500);
}

function parameters(state) {
  const asked = { k: Math.min(state.k, about.limits.k) };
  if (state.where) asked.where = state.where;
  if (state.diverse) asked.diversity = DIVERSITY;
  if (state.collapse) asked.collapse = COLLAPSE;
  return asked;
}

async function ask(state, signal) {
  const asked = parameters(state);
  if (!hasPicture(state)) return call(`search?${new URLSearchParams({ text: state.q, ...asked })}`, { signal });
  if (state.like !== null && !state.q) return call(`similar/${state.like}?${new URLSearchParams(asked)}`, { signal });
  const picture = state.like !== null ? await (await call(`image/${state.like}`, { signal })).blob() : pictures.get(state.picture);
  const body = new FormData();
  body.set("image", picture, "picture");
  if (state.q) Object.assign(asked, { text: state.q, image_weight: state.weight });
  for (const [name, value] of Object.entries(asked)) body.set(name, value);
  return call("search", { method: "POST", body, signal });
}

async function show(state) {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  fill(state);
  const empty = !state.q && !hasPicture(state);
  element("welcome").hidden = !empty;
  element("problem").hidden = true;
  if (empty || (state.picture !== null && !pictures.has(state.picture))) {
    clear();
    if (!empty) fail(new Problem("The picture is gone", "Pictures that you add are not kept when the page is loaded again. Add it once more."));
    return;
  }
  wait();
  const started = performance.now();
  try {
    const { results } = await (await ask(state, signal)).json();
    if (!signal.aborted) render(state, results, performance.now() - started);
  } catch (error) {
    if (error.name === "AbortError" || signal.aborted) return;
    clear();
    fail(error instanceof Problem ? error : new Problem("The page failed", "Load it again.", true));
  }
}

// ---------------------------------------------------------------------------------------------- showing

function fill(state) {
  text.value = state.q;
  where.value = state.where;
  weight.value = state.weight;
  diverse.checked = state.diverse;
  collapse.checked = state.collapse;
  element("picture").hidden = !hasPicture(state);
  element("weight-row").hidden = !(state.q && hasPicture(state));
  document.title = state.q ? `${state.q} – Fusion` : hasPicture(state) ? "More like a picture – Fusion" : "Fusion";
  const shown = element("picture-shown");
  if (shown.src.startsWith("blob:")) URL.revokeObjectURL(shown.src);
  if (state.like !== null) shown.src = `image/${state.like}?size=96`;
  else if (pictures.has(state.picture)) shown.src = URL.createObjectURL(pictures.get(state.picture));
  else shown.removeAttribute("src");
  shown.alt = hasPicture(state) ? "The picture that you search with" : "";
}

function wait() {
  status.textContent = "Searching…";
  grid.setAttribute("aria-busy", "true");
  if (grid.children.length) return; // the results before stay, dimmed
  for (let i = 0; i < 12; i += 1) {
    const item = document.createElement("li");
    item.className = "waiting";
    const frame = document.createElement("span");
    frame.className = "frame";
    const line = document.createElement("span");
    line.className = "line";
    item.append(frame, line);
    grid.append(item);
  }
}

function clear() {
  grid.replaceChildren();
  grid.removeAttribute("aria-busy");
  status.textContent = "";
  more.hidden = true;
}

function fail(problem) {
  const box = element("problem");
  box.querySelector("h2").textContent = problem.message;
  box.querySelector("p").textContent = problem.remedy;
  box.querySelector("button").hidden = !problem.again;
  box.hidden = false;
}

function render(state, results, milliseconds) {
  const focused = grid.contains(document.activeElement) ? results.findIndex((row) => row.id === idOf(document.activeElement)) : -1;
  clear();
  grid.append(...results.map((row) => card(state, row)));
  makeReachable(Math.max(0, focused));
  if (focused >= 0) tiles()[focused].focus({ preventScroll: true });
  const count = results.length === 1 ? "1 result" : `${results.length} results`;
  const what = !state.q ? "like the picture" : `for “${state.q}”${hasPicture(state) ? " and the picture" : ""}`;
  status.textContent = results.length ? `${count} ${what} · ${Math.round(milliseconds)} ms` : "";
  if (!results.length) fail(new Problem("Nothing found", state.where ? "No row fits “Only where …”. Ease that condition." : "The index has no rows to show."));
  more.hidden = results.length < state.k || state.k >= about.limits.k;
}

function card(state, row) {
  const item = element("card").content.cloneNode(true).firstElementChild;
  const [tile, image, missing] = [".tile", "img", ".missing"].map((name) => item.querySelector(name));
  const described = row.caption || `${row.key}, without a caption`;
  tile.href = address({ ...state, q: "", like: row.id, picture: null, k: PAGE });
  tile.dataset.id = row.id;
  tile.setAttribute("aria-label", `${described}. Score ${row.score.toFixed(3)}. More like this`);
  if (row.image) {
    image.alt = described;
    image.srcset = `image/${row.id}?size=320, image/${row.id}?size=640 2x`;
    image.src = `image/${row.id}?size=320`;
    image.addEventListener("error", () => absent(image, missing, "The picture cannot be read from its shard"));
  } else absent(image, missing, "No picture");
  const caption = item.querySelector(".caption");
  caption.textContent = row.caption || row.key;
  caption.title = row.caption || "";
  caption.classList.toggle("none", !row.caption);
  item.querySelector(".score").textContent = row.score.toFixed(3);
  const original = item.querySelector(".original");
  original.hidden = !row.image;
  original.href = `image/${row.id}`;
  original.setAttribute("aria-label", `Original of ${described}`);
  return item;
}

function absent(image, missing, why) {
  image.hidden = true;
  missing.hidden = false;
  missing.textContent = why;
}

// ---------------------------------------------------------------------------------------------- keyboard and pointer

const tiles = () => [...grid.querySelectorAll(".tile")];
const idOf = (node) => Number(node.closest("li")?.querySelector(".tile")?.dataset.id);

function makeReachable(index) {
  // one stop for the tab key in the whole grid; the arrow keys move it
  tiles().forEach((tile, i) => {
    for (const link of tile.closest("li").querySelectorAll("a")) link.tabIndex = i === index ? 0 : -1;
  });
}

function move(key, from) {
  const all = tiles();
  const columns = all.findIndex((tile) => tile.getBoundingClientRect().top > all[0].getBoundingClientRect().top + 4);
  const across = columns < 0 ? all.length : columns;
  const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across, ArrowUp: -across, Home: -from, End: all.length - 1 - from };
  const to = from + steps[key];
  if (to < 0 && key === "ArrowUp") return text.focus();
  if (!all[to]) return undefined;
  makeReachable(to);
  all[to].focus();
  return all[to].scrollIntoView({ block: "nearest" });
}

grid.addEventListener("keydown", (event) => {
  const from = tiles().indexOf(event.target.closest(".tile"));
  if (from < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
  if (["ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp", "Home", "End"].includes(event.key)) {
    event.preventDefault();
    move(event.key, from);
  }
});

grid.addEventListener("click", (event) => {
  const tile = event.target.closest(".tile");
  if (!tile || event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  window.scrollTo({ top: 0 });
  go({ q: "", like: Number(tile.dataset.id), picture: null });
});

grid.addEventListener("focusin", (event) => {
  const index = tiles().indexOf(event.target.closest("li")?.querySelector(".tile"));
  if (index >= 0) makeReachable(index);
});

document.addEventListener("keydown", (event) => {
  if (element("login").open) return;
  const writing = event.target.matches("input:not([type=checkbox], [type=range]), textarea");
  if (event.key === "/" && !writing && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    text.focus();
    text.select();
  } else if (event.key === "Escape") {
    if (event.target === text) {
      if (text.value) text.value = "";
      else text.blur();
    } else text.focus();
    event.preventDefault();
  } else if (event.key === "ArrowDown" && event.target === text && tiles().length) {
    event.preventDefault();
    tiles()[0].focus();
  }
});

// ---------------------------------------------------------------------------------------------- the form

form.addEventListener("submit", (event) => {
  event.preventDefault();
  go(typed());
});
where.addEventListener("change", () => go(typed(), true));
for (const box of [diverse, collapse]) box.addEventListener("change", () => go({ ...typed(), [box.id]: box.checked }, true));
let turning;
weight.addEventListener("input", () => {
  clearTimeout(turning);
  turning = setTimeout(() => go({ ...typed(), weight: Number(weight.value) }, true), 150);
});
more.addEventListener("click", () => go({ k: Math.min(read().k + PAGE, about.limits.k) }, true));
element("problem").querySelector("button").addEventListener("click", () => show(read()));
element("picture-remove").addEventListener("click", () => {
  go({ ...typed(), like: null, picture: null });
  text.focus();
});

function add(given) {
  if (!given) return;
  if (!given.type.startsWith("image/")) return refuse("This is no picture", "Choose a JPEG, PNG, WebP, GIF, BMP or TIFF file.");
  if (given.size > about.limits.body_bytes - 10_000) {
    return refuse("The picture is too large", `At most ${Math.floor(about.limits.body_bytes / 1e6)} MB are taken: make a smaller copy.`);
  }
  const number = pictures.size + 1;
  pictures.set(number, given);
  return go({ ...typed(), like: null, picture: number });
}

function refuse(what, remedy) {
  asking?.abort();
  element("welcome").hidden = true;
  clear();
  fail(new Problem(what, remedy));
}

element("upload").addEventListener("click", () => file.click());
file.addEventListener("change", () => {
  add(file.files[0]);
  file.value = "";
});
document.addEventListener("paste", (event) => {
  const given = [...(event.clipboardData?.files ?? [])].find((item) => item.type.startsWith("image/"));
  if (given) {
    event.preventDefault();
    add(given);
  }
});
let over = 0;
const carriesFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragenter", (event) => {
  if (!carriesFile(event)) return;
  over += 1;
  element("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!carriesFile(event)) return;
  over -= 1;
  element("drop").hidden = over > 0 ? false : true;
});
document.addEventListener("dragover", (event) => carriesFile(event) && event.preventDefault());
document.addEventListener("drop", (event) => {
  if (!carriesFile(event)) return;
  event.preventDefault();
  over = 0;
  element("drop").hidden = true;
  add(event.dataTransfer.files[0]);
});

// ---------------------------------------------------------------------------------------------- start and login

function logIn() {
  const dialog = element("login");
  if (!dialog.open) dialog.showModal();
}

element("login").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const problem = element("login-problem");
  try {
    const body = JSON.stringify({ token: element("token").value });
    await call("login", { method: "POST", body, headers: { "content-type": "application/json" } });
    element("token").value = "";
    problem.hidden = true;
    element("login").close();
    start();
  } catch (error) {
    problem.textContent = `${error.message}.`;
    problem.hidden = false;
  }
});

async function start() {
  try {
    const found = await (await call("health")).json();
    if (!found.index) return logIn();
    about = found;
  } catch (error) {
    return fail(error);
  }
  element("about").textContent = `${about.rows.toLocaleString("en")} rows · ${about.model} · ${about.column.replace("_", " ")}`;
  const list = element("examples").querySelector("ul");
  list.replaceChildren(...about.examples.map(example));
  element("examples").hidden = !about.examples.length;
  return show(read());
}

function example(query) {
  const item = document.createElement("li");
  const link = document.createElement("a");
  link.textContent = query;
  link.href = `?${new URLSearchParams({ q: query })}`;
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    go({ q: query });
  });
  item.append(link);
  return item;
}

window.addEventListener("popstate", () => show(read()));
window.addEventListener("scroll", () => document.querySelector("header").classList.toggle("lifted", scrollY > 8), { passive: true });
start();
