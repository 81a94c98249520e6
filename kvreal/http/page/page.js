"use strict";
// The live page: reads /instances and /events, follows /stream, and shows them. No library, nothing from elsewhere.
const PHASES = ["pinning", "reserving", "copying", "releasing"];
const KEPT = 500, SHOWN = 60, CARDS = 120, LINGER_S = 6, WINDOW_S = 60, BUCKETS = 30, SILENT_MS = 40000;
const $ = id => document.getElementById(id);
const events = new Map();       // event_id -> as the controller last told it
const copied = [];              // {t, link, bytes, busy}: what ended moves have brought, the last minute's
let instances = [], awaited = [], show = "", skew = 0, incarnation = 0;

// ---- words
function size(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  while (n >= 1024 && i < 4) { n /= 1024; i++; }
  return (n < 10 && i ? n.toFixed(1) : Math.round(n)) + " " + units[i];
}
function span(s) {
  if (s === undefined) return "";
  if (s < 1e-3) return Math.round(s * 1e6) + " µs";
  if (s < 1) return (s * 1e3).toFixed(s < .01 ? 1 : 0) + " ms";
  return s < 100 ? s.toFixed(1) + " s" : Math.round(s / 60) + " min";
}
function ago(t) {
  if (!t) return "";
  const s = Math.max(0, now() - t);
  if (s < 60) return Math.floor(s) + " s ago";
  return s < 3600 ? Math.floor(s / 60) + " min ago" : s < 86400 ? Math.floor(s / 3600) + " h ago" : Math.floor(s / 86400) + " d ago";
}
function whole(n) { return n.toLocaleString("en"); }
function many(n, word) { return whole(n) + " " + word + (n === 1 ? "" : "s"); }
function now() { return Date.now() / 1e3 + skew; }
const isMany = e => e.kind === "drain";
function isEnd(e) { return e.state === "done" || e.state === "failed"; }
function isAbsent(e) { return e.reason === "nothing_held"; }
function isOpen(e) { return !isEnd(e) && e.kind !== "pin"; }

// ---- the document
function el(tag, cls, ...kids) {
  const e = document.createElement(tag);
  if (cls) e.className = cls;
  for (const kid of kids) if (kid !== null && kid !== undefined) e.append(kid);
  return e;
}
// Keeps one element a key: what has not changed is not touched, so that nothing flickers and bars can glide.
function keyed(parent, items, key, make, update) {
  const old = new Map([...parent.children].map(e => [e.dataset.key, e]));
  let at = parent.firstElementChild;
  for (const item of items) {
    const name = key(item);
    let e = old.get(name);
    old.delete(name);
    if (!e) { e = make(item); e.dataset.key = name; }
    update(e, item);
    if (e === at) at = at.nextElementSibling; else parent.insertBefore(e, at);
  }
  for (const e of old.values()) e.remove();
}
// Replaces an element's content if what it is made from has changed.
function fill(e, from, make) {
  const mark = JSON.stringify(from);
  if (e.dataset.mark === mark) return;
  e.dataset.mark = mark;
  e.replaceChildren(...[make()].flat());
}
function text(e, value) { if (e.textContent !== value) e.textContent = value; }
function bar() { return el("div", "bar", el("i")); }
function setBar(e, part, all) {
  const share = all ? Math.min(1, part / all) : 0;
  e.firstElementChild.style.width = 100 * share + "%";
  e.classList.toggle("full", share > .95);
}
function empty(id, isEmpty) { $("no-" + id).hidden = !isEmpty; }

function places(e) {
  const from = e.old_position, to = e.new_positions || [];
  if (!from) return [el("span", "where", e.kind)];
  const where = el("span", "where", to.length ? from[0] + " → " + to.map(p => p[0]).join(", ") : from[0]);
  const same = to.every(p => p[1] === from[1]);
  const at = same ? from[1] : from[1] + " → " + to.map(p => p[1]).join(", ");
  return [el("span", "dim", e.kind + " "), where, el("span", "dim", " " + at)];
}

// ---- what is shown
function drawTiles() {
  const since = now() - WINDOW_S, last = [...events.values()].filter(e => isEnd(e) && e.ended > since && e.kind !== "pin");
  text($("t-flight"), whole([...events.values()].filter(isOpen).length));
  text($("t-done"), whole(last.filter(e => e.state === "done").length));
  const failed = last.filter(e => e.state === "failed"), absent = failed.filter(isAbsent).length;
  text($("t-failed"), whole(failed.length - absent));
  text($("t-absent"), "failed, last minute" + (absent ? "; " + whole(absent) + " more held nothing" : ""));
  text($("t-rate"), size(copied.reduce((sum, c) => sum + (c.t > since ? c.bytes : 0), 0) / WINDOW_S) + "/s");
  text($("sum"), many(instances.length, "instance") + (incarnation ? " · incarnation " + incarnation : ""));
}

function drawMoves() {
  const all = [...events.values()].filter(e => e.kind !== "pin" && !isAbsent(e)).reverse();
  const open = all.filter(isOpen), over = all.filter(e => e.ended > now() - LINGER_S).slice(0, 4);
  text($("moves-more"), open.length > 20 ? "20 of " + whole(open.length) : "");
  empty("moves", !open.length && !over.length);
  keyed($("moves"), [...open.slice(0, 20), ...over], e => e.event_id, e => el("div", "move",
    el("div", "row", el("span", "name", ...places(e)), el("span", "say num")),
    isMany(e) ? bar() : el("div", "steps", ...PHASES.map(name => { const i = el("i"); i.title = name; return i; }))),
  (box, e) => {
    const p = e.progress, over = isEnd(e), left = Object.keys(e.phases_s || {}).length;
    const at = e.state === "failed" ? left : PHASES.indexOf(e.state);
    box.className = "move" + (over ? " over was-" + e.state : "");
    const tokens = p ? whole(p.moved_tokens) + " of " + many(p.planned_tokens, "token") : e.num_tokens ? many(e.num_tokens, "token") : "";
    const took = over ? span(e.duration_s) : e.begun ? span(Math.max(0, now() - e.begun)) : "";
    fill(box.querySelector(".say"), [e.state, tokens, took, e.reason], () =>
      [el("span", over ? e.state : "busy", e.state), el("span", "dim", [e.reason, tokens, took].filter(Boolean).map(s => " · " + s).join(""))]);
    if (isMany(e)) setBar(box.querySelector(".bar"), p ? p.moved_tokens : over && e.state === "done" ? 1 : 0, p ? p.planned_tokens : 1);
    else [...box.querySelectorAll(".steps i")].forEach((i, n) => {
      i.className = e.state === "done" || n < at ? "past" : n === at && !over ? (p ? "now part" : "now") : "";
      i.style.setProperty("--part", p && n === at ? 100 * p.moved_tokens / (p.planned_tokens || 1) + "%" : "");
    });
  });
}

function pools(one) {  // the locations of all ranks: [{name, rank, chunks, slots, bytes}]
  return one.ranks.flatMap(r => r.locations.map(l => ({...l, rank: one.ranks.length > 1 ? r.rank : -1, at: r.address})));
}
function drawInstances() {
  const word = $("find").value.trim().toLowerCase();
  $("find").hidden = instances.length <= 12 && !word;
  const found = instances.filter(one => one.instance_id.toLowerCase().includes(word)), some = found.slice(0, CARDS);
  text($("instances-more"), found.length > some.length ? "the first " + some.length + " of " + found.length : "");
  empty("instances", !instances.length && !awaited.length);
  const gone = awaited.map(name => ({instance_id: name, ranks: [], whole: false, awaited: true}));
  keyed($("instances"), [...some, ...gone], one => one.instance_id,
    one => el("div", "", el("div", "row", el("b", "", one.instance_id), el("span", "how dim")), el("div", "pools")),
    (box, one) => {
      const silent = Math.max(0, ...one.ranks.map(r => r.heard_s_ago));
      const how = one.awaited ? "not heard since the restart" : !one.whole ? "some rank is missing" : silent > 5 ? "silent for " + span(silent)
        : many(one.ranks.length, "rank");
      text(box.querySelector(".how"), how);
      box.querySelector(".how").classList.toggle("failed", one.awaited || !one.whole || silent > 5);
      keyed(box.querySelector(".pools"), pools(one), l => l.name + " " + l.rank,
        l => el("div", "pool", el("div", "row", el("span", "", l.rank < 0 ? l.name : l.name + " · rank " + l.rank), el("span", "much dim num")), bar()),
        (pool, l) => {
          text(pool.querySelector(".much"), whole(l.chunks) + " of " + whole(l.slots) + " chunks · " + size(l.bytes));
          setBar(pool.querySelector(".bar"), l.chunks, l.slots);
        });
    });
}

const SVG = "http://www.w3.org/2000/svg";
function spark(counts, top) {
  const svg = document.createElementNS(SVG, "svg"), step = 100 / BUCKETS;
  svg.setAttribute("class", "spark");
  svg.setAttribute("viewBox", "0 0 100 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", "bytes over the last minute");
  const base = document.createElementNS(SVG, "line");
  for (const [name, value] of [["x1", 0], ["x2", 100], ["y1", 19.5], ["y2", 19.5]]) base.setAttribute(name, value);
  svg.append(base);
  counts.forEach((bytes, i) => {
    if (!bytes) return;
    const height = Math.max(1.5, 18.5 * bytes / top), r = document.createElementNS(SVG, "rect");
    for (const [name, value] of [["x", i * step], ["y", 20 - height], ["width", step * .8], ["height", height]]) r.setAttribute(name, value);
    svg.append(r);
  });
  return svg;
}
function drawLinks() {
  const t = now(), links = new Map();
  while (copied.length && copied[0].t < t - WINDOW_S) copied.shift();
  for (const c of copied) {
    let v = links.get(c.link);
    if (!v) links.set(c.link, v = {bytes: 0, moves: 0, busy: 0, counts: Array(BUCKETS).fill(0)});
    v.bytes += c.bytes; v.moves++; v.busy += c.busy;
    const i = BUCKETS - 1 - Math.floor((t - c.t) * BUCKETS / WINDOW_S);
    v.counts[Math.min(BUCKETS - 1, Math.max(0, i))] += c.bytes;
  }
  const top = Math.max(1, ...[...links.values()].flatMap(v => v.counts));
  const some = [...links].sort((a, b) => b[1].bytes - a[1].bytes).slice(0, 30);
  empty("links", !some.length);
  keyed($("links"), some, ([name]) => name,
    ([name]) => el("div", "", el("div", "row", el("b", "", name), el("span", "rate num")), el("div", "dim much"), el("div", "graph")),
    (box, [, v]) => {
      text(box.querySelector(".rate"), size(v.bytes / WINDOW_S) + "/s");
      text(box.querySelector(".much"), size(v.bytes) + " in " + many(v.moves, "move") + (v.busy ? " · " + size(v.bytes / v.busy) + "/s while copying" : ""));
      fill(box.querySelector(".graph"), v.counts, () => spark(v.counts, top));
    });
}

function order(e) { const [life, n] = e.event_id.split("-").map(Number); return life * 2 ** 32 + n; }
function drawEvents() {
  const all = [...events.values()].filter(e => !show || e.state === show).sort((a, b) => order(b) - order(a)).slice(0, SHOWN);
  empty("events", !all.length);
  keyed($("events"), all, e => e.event_id, e => {
    const row = el("button", "event", el("span", "id", e.event_id), el("span", "what", ...places(e)), el("span", "num tokens"),
      el("span", "state"), el("span", "num time"), el("span", "by dim"), el("span", "ago num"));
    row.type = "button";
    row.onclick = () => about(row.dataset.key);
    return row;
  }, (row, e) => {
    const mild = isAbsent(e), why = [e.reason, e.detail].filter(Boolean).join(": ");
    const left = e.expires_in_s === undefined ? "" : span(Math.max(0, e.seen + e.expires_in_s - now())) + " left";
    text(row.querySelector(".tokens"), e.num_tokens ? many(e.num_tokens, "token") : "");
    fill(row.querySelector(".state"), [e.state, why, left], () => [
      el("span", mild ? "mild" : isEnd(e) ? e.state : e.state === "held" ? "held" : "busy", e.state),
      why || left ? el("span", "dim why", " " + [why, left].filter(Boolean).join(", ")) : ""]);
    text(row.querySelector(".time"), span(e.duration_s));
    text(row.querySelector(".by"), e.transport || "");
    text(row.querySelector(".ago"), ago(e.ended || e.begun));
  });
}

let due = false;
function draw() {
  if (due) return;
  due = true;
  requestAnimationFrame(() => { due = false; drawTiles(); drawMoves(); drawInstances(); drawLinks(); drawEvents(); });
}

// ---- one event
function table(head, rows) {
  return el("table", "", el("tr", "", ...head.map(h => el("th", "", h))), ...rows.map(r => el("tr", "", ...r.map(c => el("td", "", String(c))))));
}
async function about(id) {
  let e;
  try { e = await get("events/" + encodeURIComponent(id)); } catch (error) { return; }
  const facts = [["state", e.state], ["reason", e.reason], ["detail", e.detail], ["tokens", e.num_tokens], ["bytes", e.bytes && size(e.bytes)],
    ["transport", e.transport], ["duration", span(e.duration_s)], ["part of", e.parent], ["idempotency key", e.idempotency_key],
    ...Object.entries(e.phases_s || {}).map(([name, s]) => [name, span(s)])].filter(f => f[1]);
  const box = [el("h2", "", e.event_id, el("span", "", ...places(e))), el("table", "", ...facts.map(([k, v]) => el("tr", "", el("th", "", k), el("td", "", String(v)))))];
  if (e.ranks) box.push(table(["rank", "pinned", "reserved", "committed", "there before", "deleted", "kept"],
    e.ranks.map(r => [r.rank, r.pinned, r.reserved, r.committed, r.present, r.deleted < 0 ? "?" : r.deleted, r.kept + (r.why ? " " + r.why : "")])));
  if (e.chunks) {
    const counts = new Map();
    for (const c of e.chunks) { const k = c.destination + "\n" + c.source; counts.set(k, (counts.get(k) || 0) + 1); }
    box.push(table(["chunks", "at the destination", "at the source"], [...counts].map(([k, n]) => [n, ...k.split("\n")])));
  }
  $("about-body").replaceChildren(...box);
  if (!$("about").open) $("about").showModal();
}

// ---- asking
function headers() { const token = sessionStorage.getItem("token"); return token ? {Authorization: "Bearer " + token} : {}; }
let asking = null;
function askToken() {
  asking = asking || new Promise(done => {
    const go = () => { sessionStorage.setItem("token", $("token").value.trim()); $("ask").close(); };
    $("token-go").onclick = go;
    $("token").onkeydown = e => { if (e.key === "Enter") go(); };
    $("ask").onclose = () => { asking = null; done(); };
    $("ask").showModal();
  });
  return asking;
}
async function ask(path, options) {
  const answer = await fetch(path, {headers: headers(), cache: "no-store", ...options});
  if (answer.status === 401) { await askToken(); throw new Error("a token is needed"); }
  if (!answer.ok) throw new Error((await answer.json().catch(() => ({}))).detail || path + ": " + answer.status);
  const date = Date.parse(answer.headers.get("date") || "");
  if (date && Math.abs(date / 1e3 + .5 - now()) > 2) skew = date / 1e3 + .5 - Date.now() / 1e3;  // this machine's clock is another
  return answer;
}
async function get(path) { return (await ask(path)).json(); }

function take(e) {
  const before = events.get(e.event_id);
  if (before && isEnd(before) && !isEnd(e)) return;  // what the stream told while /events was read
  e.seen = now();
  events.delete(e.event_id);
  events.set(e.event_id, e);
  if (isEnd(e) && e.bytes && e.ended && !isMany(e) && !(before && isEnd(before)))
    copied.push({t: e.ended, link: e.old_position[0] + " → " + e.new_positions[0][0], bytes: e.bytes, busy: (e.phases_s && e.phases_s.copying) || 0});
  if (events.size > KEPT) for (const old of events.values()) if (isEnd(old)) { events.delete(old.event_id); break; }
}
let looking = false, again = false, wait_ms = 3000;
async function look() {
  if (looking) { again = true; return; }
  looking = true;
  const begun = performance.now();
  try {
    const found = await get("instances");
    instances = found.instances; awaited = found.awaited || [];
    draw();
  } catch (error) { /* the stream says when it is back */ }
  wait_ms = Math.max(3000, 20 * (performance.now() - begun));  // many instances: seldom
  looking = false;
  if (again) { again = false; later(); }
}
let soon = null;
function later() { if (!soon) soon = setTimeout(() => { soon = null; look(); }, Math.max(250, wait_ms / 12)); }
async function poll() { for (;;) { await new Promise(r => setTimeout(r, wait_ms)); if (!document.hidden) await look(); } }

function hear(block) {
  let kind = "", data = "";
  for (const line of block.split("\n")) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    else if (line.startsWith("data: ")) data += line.slice(6);
  }
  if (kind === "event") { take(JSON.parse(data)); later(); draw(); }
  else if (kind === "instance") later();
  else if (kind === "hello") { incarnation = JSON.parse(data).incarnation; draw(); }
}
async function stream() {
  const stop = new AbortController();
  let watch = setTimeout(() => stop.abort(), SILENT_MS);
  try {
    const answer = await ask("stream", {signal: stop.signal});
    for (const e of (await get("events?limit=200")).events.reverse()) take(e);  // after the stream is open: nothing falls between
    await look();
    $("live").className = "on";
    text($("live"), "live");
    draw();
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let told = ""; ;) {
      const {value, done} = await reader.read();
      if (done) return;
      clearTimeout(watch);
      watch = setTimeout(() => stop.abort(), SILENT_MS);
      told += value;
      for (let cut; (cut = told.indexOf("\n\n")) >= 0; told = told.slice(cut + 2)) hear(told.slice(0, cut));
    }
  } finally { clearTimeout(watch); stop.abort(); }
}
async function follow() {
  for (;;) {
    let why = "";
    try { await stream(); } catch (error) { why = error instanceof TypeError || error.name === "AbortError" ? "" : ": " + error.message; }
    $("live").className = "";
    text($("live"), "not connected, trying again" + why);
    await new Promise(r => setTimeout(r, 1000));
    for (const e of [...events.values()]) if (!isEnd(e)) events.delete(e.event_id);  // told anew, if they are still there
  }
}

$("find").oninput = draw;
$("about-close").onclick = () => $("about").close();
$("about").onclick = e => { if (e.target === $("about")) $("about").close(); };
for (const button of document.querySelectorAll("#filters button"))
  button.onclick = () => {
    show = button.dataset.show;
    for (const one of document.querySelectorAll("#filters button")) one.setAttribute("aria-pressed", String(one === button));
    draw();
  };
setInterval(draw, 1000);
poll();
follow();
