// What the pages do in the browser: sort, filter and search lists, read the frontier, try a text, steer.
// Every text of a model or a corpus is put in as text, never as markup. The server adds nothing inline.
"use strict";

const find = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (name, properties = {}, ...children) => {
  const element = document.createElement(name);
  const { data = {}, ...others } = properties;
  Object.assign(element, others);
  Object.assign(element.dataset, data);
  element.append(...children);
  return element;
};
const digits = (value, count = 4) => {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return String(Number(value.toPrecision(count)));
};
// As `library.visible_token`.
const SIGNS = { "\n": "⏎", "\t": "→", " ": "·", "\r": "\\r" };
const UNSEEN = /[\p{C}\p{Z}]/gu;
const escaped = (char) => {
  const code = char.codePointAt(0).toString(16);
  return code.length <= 2 ? `\\x${code.padStart(2, "0")}` : code.length <= 4 ? `\\u${code.padStart(4, "0")}` : `\\U${code.padStart(8, "0")}`;
};
const token = (text) => text.replace(UNSEEN, (char) => SIGNS[char] ?? escaped(char)) || "∅";
const chip = (text) => make("code", { className: "chip", textContent: token(text) });
const level = (value, strongest) => {
  if (!value || !strongest) return "";
  const step = Math.max(1, Math.min(9, Math.ceil((9 * Math.abs(value)) / strongest)));
  return (value > 0 ? "a" : "n") + step;
};

// A frontier: the numbers of the point under the pointer or in focus.
for (const figure of all(".frontier")) {
  const show = (event) => {
    const point = event.target.closest("[data-tip]");
    if (point) find("[data-readout]", figure).textContent = point.dataset.tip;
  };
  figure.addEventListener("pointerover", show);
  figure.addEventListener("focusin", show);
}

// The previous and the next feature by arrow keys, where nothing else has the focus; "/" goes to the search field.
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey) return;
  if (event.target.closest("input, textarea, select, .wide, svg")) return;
  const target = { ArrowLeft: "a[rel=prev]", ArrowRight: "a[rel=next]", "/": "input[type=search]" }[event.key];
  const element = target && find(target);
  if (!element) return;
  event.preventDefault();
  if (event.key === "/") element.focus();
  else element.click();
});

// Lists.
const STEP = 100;
function list(table, columns) {
  const form = find("form[data-search]");
  const status = find("[data-status]");
  const more = find("[data-more]");
  const body = find("tbody", table);
  const root = document.body;
  const state = new URLSearchParams(location.search);
  for (const [name, value] of new URLSearchParams(location.hash.slice(1))) state.set(name, value);
  const count = columns[0].values.length;
  let found = null; // a set of features, where something is searched for
  let rows = [];
  let shown = 0;
  let address = location.hash;

  const isNumber = (column) => !["token", "tokens"].includes(column.kind);
  const sortable = (column) => column.kind !== "tokens";
  const keep = () => {
    const kept = new URLSearchParams([...state].filter(([, value]) => value !== ""));
    location.replace(`#${kept}`);
    address = location.hash;
  };
  // An address of the same list that somebody opens here.
  addEventListener("hashchange", () => {
    if (location.hash !== address) location.reload();
  });

  function cell(column, row) {
    const value = column.values[row];
    const td = make("td");
    if (column.kind === "feature") td.append(make("a", { href: feature(column.sae, value), textContent: value }));
    else if (column.kind === "pair") {
      const [a, b] = columns.filter((each) => each.kind === "feature");
      td.append(make("a", { href: pair(`${a.sae}/${a.values[row]}`, `${b.sae}/${b.values[row]}`), textContent: digits(value, 3) }));
    } else if (column.kind === "token") td.append(...(value === null ? [] : [chip(value)]));
    else if (column.kind === "tokens") for (const each of value) td.append(chip(each), " ");
    else td.textContent = digits(value);
    return td;
  }
  function showMore() {
    const next = rows.slice(shown, shown + STEP);
    body.append(...next.map((row) => make("tr", {}, ...columns.map((column) => cell(column, row)))));
    shown += next.length;
    more.hidden = shown >= rows.length;
  }
  function update() {
    const ranges = columns.filter(isNumber).flatMap((column) => {
      const [low, high] = ["min", "max"].map((end) => state.get(`${end}_${column.name}`) || "");
      if (low === "" && high === "") return [];
      return [{ values: column.values, low: low === "" ? -Infinity : Number(low), high: high === "" ? Infinity : Number(high) }];
    });
    rows = [];
    for (let row = 0; row < count; row += 1) {
      if (found && !found.has(columns[0].values[row])) continue;
      if (ranges.every(({ values, low, high }) => values[row] !== null && values[row] >= low && values[row] <= high)) rows.push(row);
    }
    const by = columns.find((column) => column.name === state.get("sort") && sortable(column));
    if (by) {
      const sign = state.get("order") === "asc" ? 1 : -1;
      const { values } = by;
      const compare = isNumber(by) ? (a, b) => a - b : (a, b) => (a < b ? -1 : a > b ? 1 : 0);
      // Rows without a value come last, whatever the order.
      rows.sort((a, b) => (values[a] === null || values[b] === null ? (values[a] === null) - (values[b] === null) : sign * compare(values[a], values[b])) || a - b);
    }
    for (const th of all("th", table)) {
      if (by && th.dataset.name === by.name) th.setAttribute("aria-sort", state.get("order") === "asc" ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    }
    status.classList.remove("failed");
    status.textContent = `${rows.length.toLocaleString("en")} of ${count.toLocaleString("en")} rows`;
    body.replaceChildren();
    shown = 0;
    showMore();
    root.dataset.ready = "yes";
  }
  let searches = 0;
  async function search() {
    const kind = state.get("kind") || "token";
    const text = state.get("q") || "";
    const mine = (searches += 1);
    try {
      const numbers = text.trim() === "" ? null : await lookUp(form.dataset.search, kind, text);
      if (mine !== searches) return; // a later search has begun
      found = numbers && new Set(numbers);
      update();
    } catch (error) {
      status.classList.add("failed");
      status.textContent = error.message;
    }
  }

  all("th", table).forEach((th, number) => {
    const column = columns[number];
    if (!sortable(column)) return;
    const button = make("button", { type: "button", textContent: th.textContent });
    button.addEventListener("click", () => {
      const isSame = state.get("sort") === column.name;
      const first = isNumber(column) && column.kind !== "feature" ? "desc" : "asc";
      state.set("order", isSame ? { asc: "desc", desc: "asc" }[state.get("order")] : first);
      state.set("sort", column.name);
      keep();
      update();
    });
    th.replaceChildren(button);
  });
  const ranges = find("[data-ranges]");
  for (const column of columns.filter(isNumber)) {
    const ends = ["min", "max"].map((end) => {
      const name = `${end}_${column.name}`;
      const label = `${column.label}, ${end === "min" ? "at least" : "at most"}`;
      const input = make("input", { type: "number", step: "any", name, value: state.get(name) || "", placeholder: end, ariaLabel: label });
      input.addEventListener("input", () => {
        state.set(name, input.value);
        keep();
        update();
      });
      return input;
    });
    if (ends.some((input) => input.value !== "")) ranges.parentElement.open = true;
    ranges.append(make("label", {}, column.label, make("span", {}, ...ends)));
  }
  find("[data-tools]").hidden = false;
  more.addEventListener("click", showMore);
  if (!form) return update();
  form.elements.kind.value = state.get("kind") || "token";
  form.elements.q.value = state.get("q") || "";
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    state.set("kind", form.elements.kind.value);
    state.set("q", form.elements.q.value);
    keep();
    search();
  });
  return search();
}

// Addresses, as `pages.Links` has them. In files, this script lies in the folder `static` beside the first page.
const base = new URL("..", find("script[src$='static/viewer.js']").src);
const isFile = () => Boolean(find("[data-search=file], [data-compare=file]"));
const feature = (sae, number) => new URL(`${encodeURIComponent(sae)}/${number}${isFile() ? "/index.html" : ""}`, base).href;
const pair = (a, b) => `${new URL(isFile() ? "compare/index.html" : "compare", base).href}?${new URLSearchParams({ a, b })}`;

async function lookUp(where, kind, text) {
  if (kind === "number") {
    const words = text.split(/[\s,]+/).filter(Boolean);
    if (!words.every((word) => /^\d{1,9}$/.test(word))) throw new Error("Write numbers of features, such as 3, 17.");
    return words.map(Number);
  }
  if (where === "server") return answer(await fetch(`search?${new URLSearchParams({ kind, q: text })}`));
  await loaded("search.js", "SEARCH");
  const stripped = text.replace(/^[ \n\t]+|[ \n\t]+$/g, "");
  if (kind !== "context") {
    const known = SEARCH[kind === "token" ? "active_on" : "promoting"];
    return Object.hasOwn(known, stripped) ? known[stripped] : [];
  }
  const wanted = text.toLowerCase();
  return SEARCH.with_context.filter(([row]) => row.toLowerCase().includes(wanted)).flatMap(([, features]) => features);
}
function loaded(source, name) {
  if (name in globalThis) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const script = make("script", { src: source });
    script.addEventListener("load", resolve);
    script.addEventListener("error", () => reject(new Error(`${source} cannot be read.`)));
    document.head.append(script);
  });
}
async function answer(response) {
  const value = await response.json().catch(() => ({ error: `The server answered ${response.status}.` }));
  if (!response.ok) throw new Error(value.error);
  return value;
}
async function ask(path, value) {
  const headers = { "Content-Type": "application/json" };
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(value) }));
}
// Runs what a form asks for, and says how it goes.
function onSubmit(form, run) {
  const status = find("[data-status]");
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = find("button:not([type=button])", form);
    status.classList.remove("failed");
    status.textContent = "Computing. The first time, the language model is loaded and compiled.";
    button.disabled = true;
    const start = performance.now();
    try {
      const note = await run();
      find("[data-results]").hidden = false;
      status.textContent = `${note}${((performance.now() - start) / 1000).toFixed(2)} s`;
    } catch (error) {
      status.classList.add("failed");
      status.textContent = error.message;
    } finally {
      button.disabled = false;
    }
  });
}

const table = find("[data-list]");
if (table && "LIST" in globalThis) list(table, LIST.columns);

// Two features side by side, in files: their pages in frames.
const compare = find("form[data-compare=file]");
if (compare) {
  const show = (query) => {
    const both = ["a", "b"].map((name) => (query.get(name) || "").trim());
    if (!both.every(Boolean)) return;
    const places = both.map((text) => /^(.*?)(?:\/(\d+))?$/.exec(text));
    const known = all("#saes option").map((option) => option.value);
    if (!places.every((place) => place && known.includes(place[1]))) return;
    if (places.every((place) => place[2] === undefined)) {
      location.href = new URL(`compare/${places.map((place) => encodeURIComponent(place[1])).join("/")}/index.html`, base).href;
      return;
    }
    both.forEach((text, number) => { compare.elements["ab"[number]].value = text; });
    const frames = places.map(([text, sae, number]) => make("iframe", { src: feature(sae, number || 0), title: text }));
    find("[data-frames]")?.replaceChildren(...frames);
  };
  const frames = find("[data-frames]");
  if (frames) {
    compare.addEventListener("submit", (event) => {
      event.preventDefault();
      show(new URLSearchParams(new FormData(compare)));
    });
    show(new URLSearchParams(location.search));
  }
}

// Try a text.
const trying = find("form[data-try]");
if (trying) {
  onSubmit(trying, async () => {
    const sae = trying.elements.sae.value;
    const result = await ask("/api/text", { sae, text: trying.elements.text.value });
    const buttons = result.tokens.map((text, at) => {
      const button = make("button", { type: "button", textContent: token(text), disabled: result.active[at] === null });
      button.addEventListener("click", () => ofToken(at));
      return button;
    });
    find("[data-tokens]").replaceChildren(...buttons);
    const heading = find("[data-of-token]");
    const body = find("[data-features]");
    const strongest = new Map();
    for (const pairs of result.active) {
      for (const [number, value] of pairs ?? []) {
        if (Math.abs(value) > Math.abs(strongest.get(number) ?? 0)) strongest.set(number, value);
      }
    }
    function rowsOf(pairs) {
      const rows = pairs.slice(0, STEP).map(([number, value]) => {
        const known = result.features[number];
        const show = make("button", { type: "button", textContent: "on text", ariaLabel: `Show feature ${number} on the text` });
        show.addEventListener("click", () => ofFeature(number));
        return make(
          "tr", {},
          make("td", {}, make("a", { href: feature(sae, number), textContent: number })),
          make("td", { textContent: digits(value, 3) }),
          make("td", { textContent: digits(known.strongest, 3) }),
          make("td", {}, ...(known.on === null ? [] : [chip(known.on)])),
          make("td", {}, show),
        );
      });
      body.replaceChildren(...rows);
    }
    function ofToken(at) {
      buttons.forEach((button, number) => button.setAttribute("aria-pressed", number === at));
      heading.textContent = `Features of ${token(result.tokens[at])}: ${result.active[at].length}`;
      rowsOf(result.active[at]);
    }
    function ofFeature(number) {
      const most = Math.abs(strongest.get(number));
      buttons.forEach((button, at) => {
        const [, value] = (result.active[at] ?? []).find(([each]) => each === number) ?? [0, 0];
        button.className = level(value, most);
        button.title = value ? digits(value, 3) : "";
        button.setAttribute("aria-pressed", false);
      });
      heading.textContent = `Feature ${number} on the text`;
    }
    heading.textContent = `Features of the text: ${strongest.size}`;
    rowsOf([...strongest].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])));
    const left = result.left_out ? `${result.left_out} weak activations are left out. ` : "";
    return `${result.tokens.length} tokens. ${left}`;
  });
}

// Steer and ablate.
const steering = find("form[data-steer]");
if (steering) {
  const edits = find("[data-edits]");
  const bind = (edit) => {
    const [kind, strength] = ["kind", "strength"].map((name) => find(`[name=${name}]`, edit));
    kind.addEventListener("change", () => { strength.disabled = kind.value === "ablate"; });
    find("[data-remove]", edit).addEventListener("click", () => edit.remove());
  };
  all("[data-edit]", edits).forEach(bind);
  find("[data-add]").addEventListener("click", () => {
    edits.append(find("[data-blank]").content.cloneNode(true));
    bind(edits.lastElementChild);
    find("[name=feature]", edits.lastElementChild).focus();
  });
  onSubmit(steering, async () => {
    const value = (name, within = steering) => find(`[name=${name}]`, within).value;
    const text = value("text");
    const result = await ask("/api/steer", {
      text,
      edits: all("[data-edit]", edits).map((edit) => ({
        sae: value("sae", edit),
        feature: Number(value("feature", edit)),
        strength: value("kind", edit) === "ablate" ? null : Number(value("strength", edit)),
      })),
      tokens: Number(value("tokens")),
      temperature: Number(value("temperature")),
      seed: Number(value("seed")),
    });
    for (const name of ["without", "with"]) {
      find(`[data-${name}]`).replaceChildren(make("span", { className: "prompt", textContent: text }), result[name]);
    }
    const percent = (share) => `${(100 * share).toFixed(2)}%`;
    const bar = (share) => make("td", {}, make("meter", { value: share, max: 1, ariaLabel: percent(share) }), ` ${percent(share)}`);
    find("[data-probabilities]").replaceChildren(
      ...result.probabilities.map(([name, without, steered]) =>
        make("tr", {}, make("td", {}, chip(name)), bar(without), bar(steered), make("td", { textContent: `${steered >= without ? "+" : "−"}${percent(Math.abs(steered - without))}` })),
      ),
    );
    return "";
  });
}
