"use strict";
/* The page of one run. Every text of the run goes through `text` before it becomes HTML. */
(() => {
const began = performance.now();
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { step: 0, teacher: "", by: "kl", sort: "total", source: "", reward: "", query: "", marked: -1 };
let shown = [];      // the answers that pass the filters, in order
let step = null;     // the step's columns, as typed arrays
let cursor = null;   // {answer, at}: the token whose window is open
let kept = false;    // whether that window stays when the pointer leaves

// Texts ---------------------------------------------------------------------------------------------------------------

const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
/* Marks that turn the direction of what follows are told, not obeyed. */
const text = (s) => String(s).replace(/[&<>"']/g, (c) => ESCAPES[c])
  .replace(/[\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) => `<u>\\u${c.charCodeAt(0).toString(16)}</u>`);
const visible = (s) => s === "" ? "<u>∅</u>" : text(s).replace(/\n/g, "<u>↵</u>").replace(/\t/g, "<u>⇥</u>").replace(/\r/g, "<u>␍</u>")
  .replace(/^ +| +$/g, (spaces) => `<u>${"␣".repeat(spaces.length)}</u>`);
const inText = (s) => s === "" ? "<u>∅</u>" : text(s).replace(/\n/g, "<u>↵</u>\n").replace(/\r/g, "<u>␍</u>");
const number = (x, digits = 3) => x === null || Number.isNaN(x) ? "–"
  : x === 0 ? "0" : Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3 ? x.toExponential(1) : String(+x.toPrecision(digits));
const percent = (logp) => {
  const p = 100 * Math.exp(logp);
  return Number.isNaN(p) ? "–" : p >= 99.95 && p < 100 ? p.toFixed(2) : p >= 0.1 ? p.toFixed(1) : p >= 0.001 ? p.toFixed(3) : p.toExponential(0);
};

// Data: whole numbers of 16 bits with a scale; -32768 is what is not known ------------------------------------------

const bytes = (base64) => {
  const raw = atob(base64), found = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) found[i] = raw.charCodeAt(i);
  return found.buffer;
};
const numbers = (packed) => {
  const whole = new Int16Array(bytes(packed.data)), found = new Float32Array(whole.length);
  for (let i = 0; i < whole.length; i++) found[i] = whole[i] === -32768 ? NaN : whole[i] * packed.scale;
  return found;
};
const places = (base64) => data.wide ? new Uint32Array(bytes(base64)) : new Uint16Array(bytes(base64));

function load(number) {
  const its = data.steps[number];
  if (its.loaded) return its.loaded;
  const columns = {};
  for (const [name, packed] of Object.entries(its.columns)) columns[name] = numbers(packed);
  let at = 0;
  const answers = its.answers.map((row, i) => {
    const answer = { ...row, number: i, from: at, stop: at + row.tokens };
    at = answer.stop;
    answer.found = `${row.prompt}\n${row.response}`.toLowerCase();
    return answer;
  });
  const learnt = new Uint8Array(bytes(its.learnt));
  numberTurns(answers, learnt);
  its.loaded = { ...its, columns, answers, learnt, token: places(its.token), tops: {} };
  return its.loaded;
}

/* Who begins to write at a token: the policy, by the number of its turn, or its environment. A plain answer says
   nothing; the turns of an episode's later parts go on counting. */
function numberTurns(answers, learnt) {
  answers.forEach((answer, i) => {
    const before = answers[i - 1], goesOn = answer.part > 0 && before && before.part === answer.part - 1
      && before.source === answer.source && before.index === answer.index && before.sample === answer.sample;
    let turn = goesOn ? before.last : 0;
    answer.begins = new Map();
    for (let at = answer.from; at < answer.stop; at++) {
      if (at > answer.from && learnt[at] === learnt[at - 1]) continue;
      if (learnt[at]) turn++;
      answer.begins.set(at, learnt[at] ? `turn ${turn}` : "environment");
    }
    answer.last = turn;
    if (!answer.ended && answer.begins.size < 2) answer.begins.clear();
  });
}

/* The likeliest tokens of a model, `data.candidates` for each token; they are unpacked when a window first asks. */
function top(model) {
  if (!(model in step.tops)) {
    const packed = step.top[model];
    step.tops[model] = packed ? { ids: places(packed.ids), logps: numbers(packed.logps) } : null;
  }
  return step.tops[model];
}

// Measures ------------------------------------------------------------------------------------------------------------

const of = (name) => step.columns[name];
const nameOf = (what) => state.teacher ? `${what}/${state.teacher}` : what;
const teachersLogp = () => of(state.teacher ? `logp/${state.teacher}` : "logp_target");
const MEASURES = {
  kl: { label: "KL to the teacher", unit: "nats", values: () => of(nameOf("kl")), low: "agree", high: "disagree" },
  gap: {
    label: "log-prob gap", unit: "nats, teacher − student", both: true, low: "teacher: less likely", high: "teacher: likelier",
    values: () => { const theirs = teachersLogp(), ours = of("logp"); return theirs && ours && ours.map((x, i) => theirs[i] - x); },
  },
  entropy: { label: "student's entropy", unit: "nats", values: () => of("entropy"), low: "certain", high: "open" },
  surprise: { label: "student's surprise", unit: "nats, −log p", values: () => of("logp") && of("logp").map((x) => -x), low: "likely", high: "unlikely" },
  advantage: { label: "advantage", unit: "", both: true, values: () => of("advantage"), low: "discouraged", high: "encouraged" },
};
const isKnown = (values) => Boolean(values) && values.some((x) => !Number.isNaN(x));

/* The colour of a step is full at the 99th percentile, so that one token does not blanch all others. */
let drawn = null;
function measure() {
  const how = MEASURES[state.by], values = how.values() || new Float32Array(step.token.length).fill(NaN);
  const sizes = Float32Array.from(values).filter((x) => !Number.isNaN(x)).map(Math.abs).sort();
  const quantile = (q) => sizes.length ? sizes[Math.min(sizes.length - 1, Math.floor(q * sizes.length))] : 0;
  drawn = { how, values, full: quantile(0.99) || 1, far: Math.max(quantile(0.95), 1e-6) };
  const kl = of(nameOf("kl"));
  for (const answer of step.answers) {
    answer.total = 0; answer.most = 0; answer.known = 0;
    for (let i = answer.from; kl && i < answer.stop; i++) {
      if (Number.isNaN(kl[i])) continue;
      answer.total += kl[i]; answer.known++;
      if (kl[i] > answer.most) answer.most = kl[i];
    }
    answer.mean = answer.known ? answer.total / answer.known : 0;
  }
}

const SORTS = {
  order: ["as sampled", (a, b) => a.number - b.number],
  total: ["total KL, largest first", (a, b) => b.total - a.total],
  least: ["total KL, smallest first", (a, b) => a.total - b.total],
  mean: ["mean KL, largest first", (a, b) => b.mean - a.mean],
  most: ["largest KL of a token", (a, b) => b.most - a.most],
  worst: ["reward, lowest first", (a, b) => (a.reward ?? 2) - (b.reward ?? 2)],
  best: ["reward, highest first", (a, b) => (b.reward ?? -1) - (a.reward ?? -1)],
  longest: ["longest first", (a, b) => b.tokens - a.tokens],
};
const REWARDS = {
  "": ["any", () => true],
  none: ["not graded", (r) => r === null],
  zero: ["0", (r) => r === 0],
  some: ["between", (r) => r !== null && r > 0 && r < 1],
  one: ["1", (r) => r === 1],
};

function choose() {
  const query = state.query.toLowerCase(), holds = (answer) => {
    for (let i = answer.from; i < answer.stop; i++) if (step.token[i] === state.marked) return true;
    return false;
  };
  shown = step.answers.filter((a) => (!state.source || a.source === state.source) && REWARDS[state.reward][1](a.reward)
    && (!query || a.found.includes(query)) && (state.marked < 0 || holds(a)));
  shown.sort((a, b) => SORTS[state.sort][1](a, b) || a.number - b.number);
}

// Answers -------------------------------------------------------------------------------------------------------------

const soon = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { soon.unobserve(entry.target); fill(entry.target); }
}, { rootMargin: "600px" });

function card(answer) {
  const chips = [];
  if (answer.reward !== null) chips.push(`<span class="chip${answer.reward >= 1 ? " good" : ""}">reward ${number(answer.reward)}</span>`);
  if (answer.origin !== "student") chips.push(`<span class="chip">by ${text(answer.origin)}</span>`);
  if (answer.ended) {
    const many = (n, what) => `${n} ${what}${n === 1 ? "" : "s"}`;
    chips.push(`<span class="chip">${many(answer.turns, "turn")}, ${many(answer.calls, "call")}</span>`);
    if (answer.ended !== "answered") chips.push(`<span class="chip">ended: ${text(answer.ended)}</span>`);
  } else if (answer.finish !== "stop") chips.push(`<span class="chip">ended by ${text(answer.finish)}</span>`);
  if (answer.part) chips.push(`<span class="chip">part ${answer.part + 1}</span>`);
  const lines = Math.ceil(answer.response.length / 95) + answer.response.split("\n").length - 1;
  return `<article class="card" data-n="${answer.number}"><div>`
    + `<b>${text(answer.source)}</b><span>row ${answer.index}, sample ${answer.sample + 1}</span>${chips.join("")}`
    + `<span class="total">${answer.tokens} tokens · KL <b>${number(answer.total)}</b> in all, <b>${number(answer.mean)}</b> a token</span></div>`
    + `<div class="prompt" dir="auto">${text(answer.prompt)}</div>`
    + `<div class="tokens" tabindex="0" role="group" dir="auto" style="min-height:${Math.max(1, lines) * 26}px"`
    + ` aria-label="answer to ${text(answer.source)}, row ${answer.index}; arrow keys go through its tokens"></div></article>`;
}

function fill(article) {
  const answer = step.answers[article.dataset.n], box = article.querySelector(".tokens"), { values, full, far, how } = drawn;
  const html = [];
  for (let i = answer.from; i < answer.stop; i++) {
    const x = values[i], id = step.token[i], names = [];
    if (!step.learnt[i]) names.push("x");
    if (x < 0) names.push("m");
    if (Math.abs(x) >= far) names.push("far");
    if (id === state.marked) names.push("mark");
    const who = answer.begins.get(i);
    if (who) names.push("begins");
    const strength = Number.isNaN(x) || (x < 0 && !how.both) ? 0 : Math.min(1, Math.abs(x) / full) ** 0.7 * 0.72;
    html.push(`<span${names.length ? ` class="${names.join(" ")}"` : ""}${who ? ` data-who="${who}"` : ""}${strength > 0.01 ? ` style="--a:${strength.toFixed(2)}"` : ""}>${inText(data.texts[id])}</span>`);
  }
  box.innerHTML = html.join("");
  box.style.minHeight = "";
}

function draw() {
  soon.disconnect();
  close();
  const main = byId("answers");
  main.innerHTML = shown.length ? shown.map(card).join("") : '<p class="none">No answer passes these filters.</p>';
  let room = 2000;  // tokens that are drawn at once: a window has no more, and the others come when they are near
  for (const article of main.querySelectorAll(".card")) {
    if (room > 0) { fill(article); room -= step.answers[article.dataset.n].tokens; } else soon.observe(article);
  }
  const tokens = shown.reduce((n, a) => n + a.known, 0), total = shown.reduce((x, a) => x + a.total, 0);
  const kl = tokens ? ` Mean KL ${number(total / tokens)} nats a token.` : "";
  byId("sum").textContent = `${shown.length} of ${step.answers.length} answers, ${tokens.toLocaleString("en")} tokens.${kl}`;
  legend();
  worst();
}

function legend() {
  const { how, full } = drawn, stops = [];
  for (let i = 0; i <= 8; i++) {
    const x = how.both ? i / 4 - 1 : i / 8, colour = x < 0 ? "--minus" : "--plus";
    stops.push(`rgb(var(${colour}) / ${(Math.abs(x) ** 0.7 * 0.72).toFixed(2)})`);
  }
  byId("legend").innerHTML = `<span>${how.low} ${how.both ? `−${number(full)}` : "0"}</span>`
    + `<i style="background:linear-gradient(90deg,${stops.join(",")})"></i>`
    + `<span>${number(full)} ${how.high}</span><span>${how.label}${how.unit ? `, ${how.unit}` : ""}; underlined: the 5 % strongest</span>`;
}

function worst() {
  const kl = of(nameOf("kl")), sums = new Map();
  let all = 0;
  for (const answer of shown) for (let i = answer.from; kl && i < answer.stop; i++) {
    if (Number.isNaN(kl[i])) continue;
    const known = sums.get(step.token[i]) || [0, 0];
    known[0] += kl[i]; known[1]++;
    sums.set(step.token[i], known);
    all += kl[i];
  }
  const rows = [...sums].sort((a, b) => b[1][0] - a[1][0]).slice(0, 12);
  if (state.marked >= 0 && !rows.some(([id]) => id === state.marked)) rows.push([state.marked, sums.get(state.marked) || [0, 0]]);
  const most = rows.length ? rows[0][1][0] : 1;
  byId("worst").innerHTML = rows.length ? `<tr><th scope="col">token</th><th scope="col">times</th><th scope="col">mean</th><th scope="col">share</th><th></th></tr>`
    + rows.map(([id, [sum, count]]) => `<tr><td><button data-id="${id}" aria-pressed="${id === state.marked}">${visible(data.texts[id])}</button></td>`
      + `<td>${count}</td><td>${number(count ? sum / count : NaN, 2)}</td><td>${all ? Math.round(100 * sum / all) : 0} %</td>`
      + `<td class="share"><i style="width:${Math.max(0, 100 * sum / most).toFixed(0)}%"></i></td></tr>`).join("") : "";
}

// The window of a token -----------------------------------------------------------------------------------------------

const spanAt = (answer, at) => {
  const article = document.querySelector(`.card[data-n="${answer.number}"]`);
  if (!article) return null;
  const box = article.querySelector(".tokens");
  if (!box.firstChild) { soon.unobserve(article); fill(article); }
  return box.children[at - answer.from];
};

function close() {
  document.querySelector(".tokens .at")?.classList.remove("at");
  byId("tip").hidden = true;
  kept = false; cursor = null;
}

function open(answer, at, { speak = false, keep = false } = {}) {
  close();
  const span = spanAt(answer, at);
  if (!span) return;
  cursor = { answer, at }; kept = keep;
  span.classList.add("at");
  const tip = byId("tip");
  tip.innerHTML = about(answer, at);
  tip.classList.toggle("kept", keep);
  tip.hidden = false;
  if (speak) {
    const near = span.getBoundingClientRect();
    if (near.top < 110 || near.bottom > innerHeight - 40) span.scrollIntoView({ block: "center", behavior: "instant" });
    byId("spoken").textContent = spoken(at);
  }
  const spot = span.getClientRects()[0] || span.getBoundingClientRect(), size = tip.getBoundingClientRect();
  const below = spot.bottom + 8 + size.height < innerHeight;
  tip.style.left = `${Math.max(8, Math.min(spot.left, innerWidth - size.width - 8))}px`;
  tip.style.top = `${below ? spot.bottom + 8 : Math.max(8, spot.top - size.height - 8)}px`;
}

function spoken(at) {
  const parts = [data.texts[step.token[at]], `${drawn.how.label} ${number(drawn.values[at])}`];
  for (const model of models()) {
    const list = candidates(model, at);
    if (list.length) parts.push(`${model || "student"}: ${list.slice(0, 2).map(([id, x]) => `${data.texts[id]} ${percent(x)} percent`).join(", ")}`);
  }
  return parts.join("; ");
}

const models = () => ["", ...(state.teacher ? [state.teacher] : data.teachers)];

function candidates(model, at) {
  const list = top(model), found = [];
  for (let k = 0; list && k < data.candidates; k++) {
    const i = at * data.candidates + k;
    if (!Number.isNaN(list.logps[i])) found.push([list.ids[i], list.logps[i]]);
  }
  return found;
}

function about(answer, at) {
  const fact = (label, x) => x === undefined || Number.isNaN(x) ? "" : `<span>${text(label)} <b>${number(x)}</b></span>`;
  const chance = (label, x) => x === undefined || Number.isNaN(x) ? "" : `<span>${text(label)} <b>${percent(x)} %</b></span>`;
  const value = (name) => of(name)?.[at];
  const facts = [chance("student", value("logp")), chance("sampler", value("logp_sampler")),
    ...data.teachers.map((name) => chance(name, value(`logp/${name}`))), fact("KL", value("kl"))];
  if (data.teachers.length > 1) facts.push(...data.teachers.map((name) => fact(`KL to ${name}`, value(`kl/${name}`))));
  facts.push(fact("gap", (teachersLogp()?.[at] ?? NaN) - (value("logp") ?? NaN)), fact("entropy", value("entropy")), fact("advantage", value("advantage")));
  const list = (model) => {
    const rows = candidates(model, at).map(([id, x]) => `<tr${id === step.token[at] ? ' class="taken"' : ""}><td>${visible(data.texts[id])}</td>`
      + `<td>${percent(x)} %</td><td><i style="width:${(70 * Math.exp(x)).toFixed(1)}px"></i></td></tr>`);
    return rows.length ? `<table${model ? ' class="theirs"' : ""}><caption>${text(model || "student")}</caption>${rows.join("")}</table>` : "";
  };
  const why = step.learnt[at] ? "" : "<span>not learnt: nobody was asked about it</span>";
  return `<div class="what">${visible(data.texts[step.token[at]])}</div>`
    + `<div class="facts"><span>token ${at - answer.from + 1} of ${answer.tokens}</span>${why}${facts.join("")}</div>`
    + `<div class="lists">${models().map(list).join("")}</div>`;
}

// Curves --------------------------------------------------------------------------------------------------------------

const FIRST = [/^kl\/ensemble$/, /^kl\//, /^reward$|^reward\/mean$/, /^eval\/accuracy\/all$/, /^agreement\/ensemble$/, /^rollout\/length$/, /^entropy$/, /^grad_norm$/, /^loss$/];
const W = 300, H = 92, LEFT = 38, BOTTOM = 14;

function chart(name) {
  const points = data.curves[name], xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(...xs);
  let y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (y0 > 0 && y0 < 0.4 * y1) y0 = 0;
  if (y0 === y1) { y0 -= 0.5; y1 += 0.5; }
  const x = (v) => LEFT + (v - x0) / (x1 - x0 || 1) * (W - LEFT - 4), y = (v) => H - BOTTOM - (v - y0) / (y1 - y0) * (H - BOTTOM - 8);
  const line = points.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join(" ");
  const dots = points.length < 30 ? points.map(([a, b]) => `<circle class="dot" r="2" cx="${x(a).toFixed(1)}" cy="${y(b).toFixed(1)}"/>`).join("") : "";
  const here = data.steps[state.step].step, marked = here >= x0 && here <= x1 ? `<line class="here" x1="${x(here)}" x2="${x(here)}" y1="4" y2="${H - BOTTOM}"/>` : "";
  const last = points[points.length - 1];
  const figure = document.createElement("figure");
  figure.innerHTML = `<figcaption><span>${text(name)}</span><output>${number(points[0][1])} → ${number(last[1])}</output></figcaption>`
    + `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${text(name)}: ${number(points[0][1])} at step ${x0}, ${number(last[1])} at step ${x1}">`
    + `<line class="grid" x1="${LEFT}" x2="${W}" y1="${y(y0)}" y2="${y(y0)}"/><line class="grid" x1="${LEFT}" x2="${W}" y1="${y(y1)}" y2="${y(y1)}"/>`
    + `<text x="${LEFT - 4}" y="${y(y0)}" text-anchor="end">${number(y0, 2)}</text><text x="${LEFT - 4}" y="${y(y1) + 6}" text-anchor="end">${number(y1, 2)}</text>`
    + `<text x="${LEFT}" y="${H - 2}">step ${x0}</text><text x="${W - 4}" y="${H - 2}" text-anchor="end">${x1}</text>`
    + `${marked}<polyline class="curve" points="${line}"/>${dots}<line class="under" x1="-9" x2="-9" y1="4" y2="${H - BOTTOM}"/><rect class="hit" x="${LEFT}" y="0" width="${W - LEFT}" height="${H}"/></svg>`;
  const svg = figure.querySelector("svg"), told = figure.querySelector("output"), before = told.textContent;
  const nearest = (event) => {
    const box = svg.getBoundingClientRect(), at = x0 + ((event.clientX - box.left) / box.width * W - LEFT) / (W - LEFT - 4) * (x1 - x0);
    return points.reduce((best, p) => Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best);
  };
  const under = figure.querySelector(".under");
  const move = (to) => { under.setAttribute("x1", to); under.setAttribute("x2", to); };
  svg.addEventListener("mousemove", (event) => { const p = nearest(event); told.textContent = `step ${p[0]}: ${number(p[1])}`; move(x(p[0])); });
  svg.addEventListener("mouseleave", () => { told.textContent = before; move(-9); });
  svg.addEventListener("click", (event) => {
    const [at] = nearest(event), steps = data.steps.map((s) => Math.abs(s.step - at));
    go(steps.indexOf(Math.min(...steps)));
  });
  return figure;
}

let charts = [];
function drawCurves() {
  byId("charts").replaceChildren(...charts.map(chart));
}

// Controls ------------------------------------------------------------------------------------------------------------

const fillSelect = (id, pairs) => { byId(id).innerHTML = pairs.map(([value, label]) => `<option value="${text(value)}">${text(label)}</option>`).join(""); };

/* A control is there where it has something to choose. */
function only(id, isUseful) {
  byId(id).closest(".field").hidden = !isUseful;
  if (!isUseful) state[id] = byId(id).value = "";
}

function go(number) {
  if (number < 0 || number >= data.steps.length) return;
  state.step = number;
  step = load(number);
  byId("step").value = String(number);
  byId("before").disabled = number === 0;
  byId("behind").disabled = number === data.steps.length - 1;
  const sources = [...new Set(step.answers.map((a) => a.source))];
  fillSelect("source", [["", "all"], ...sources.map((s) => [s, s])]);
  if (!sources.includes(state.source)) state.source = "";
  byId("source").value = state.source;
  only("source", sources.length > 1);
  only("reward", step.answers.some((a) => a.reward !== null));
  const known = Object.entries(MEASURES).filter(([, how]) => isKnown(how.values()));
  fillSelect("by", known.map(([name, how]) => [name, how.label]));
  if (known.length && !known.some(([name]) => name === state.by)) state.by = known[0][0];
  byId("by").value = state.by;
  measure(); choose(); draw(); drawCurves();
}

function begin() {
  document.title = `${data.name} · megatron-opd`;
  byId("name").textContent = data.name;
  byId("about").textContent = data.about;
  fillSelect("step", data.steps.map((s, i) => [i, s.step]));
  fillSelect("teacher", data.teachers.length === 1 ? [["", data.teachers[0]]] : [["", data.teachers.length ? "all together" : "none"], ...data.teachers.map((t) => [t, t])]);
  fillSelect("sort", Object.entries(SORTS).map(([value, [label]]) => [value, label]));
  byId("sort").value = state.sort;
  fillSelect("reward", Object.entries(REWARDS).map(([value, [label]]) => [value, label]));
  const names = Object.keys(data.curves);
  charts = [...new Set(FIRST.flatMap((pattern) => names.filter((name) => pattern.test(name)).slice(0, 1)))].slice(0, 5);
  fillSelect("metric", [["", "…"], ...names.map((name) => [name, name])]);
  byId("curves").hidden = !names.length;
  byId("metric").addEventListener("change", (event) => {
    const name = event.target.value;
    if (name && !charts.includes(name)) { charts.push(name); drawCurves(); }
    event.target.value = "";
  });
  byId("step").addEventListener("change", (event) => go(Number(event.target.value)));
  byId("before").addEventListener("click", () => go(state.step - 1));
  byId("behind").addEventListener("click", () => go(state.step + 1));
  for (const id of ["teacher", "by", "sort", "source", "reward"]) byId(id).addEventListener("change", (event) => { state[id] = event.target.value; measure(); choose(); draw(); });
  let waiting = 0;
  byId("query").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.query = event.target.value; choose(); draw(); }, 120);
  });
  byId("worst").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    state.marked = Number(button.dataset.id) === state.marked ? -1 : Number(button.dataset.id);
    choose(); draw();
    byId("worst").querySelector(`[data-id="${button.dataset.id}"]`)?.focus();
  });
  listen();
  go(data.steps.length - 1);
}

const placeOf = (target) => {
  const span = target.closest?.(".tokens > span");
  if (!span) return null;
  const answer = step.answers[span.closest(".card").dataset.n];
  return { answer, at: answer.from + Array.prototype.indexOf.call(span.parentNode.children, span) };
};

function listen() {
  const main = byId("answers");
  main.addEventListener("mouseover", (event) => {
    if (kept) return;
    const place = placeOf(event.target);
    if (place) open(place.answer, place.at); else if (cursor) close();
  });
  main.addEventListener("mouseleave", () => { if (!kept) close(); });
  main.addEventListener("click", (event) => {
    const place = placeOf(event.target);
    if (place) open(place.answer, place.at, { keep: true }); else close();
  });
  main.addEventListener("focusin", (event) => {
    const article = event.target.closest(".card");
    if (!event.target.matches(".tokens:focus-visible") || !article) return;
    const answer = step.answers[article.dataset.n];
    if (cursor?.answer !== answer && answer.tokens) open(answer, answer.from, { speak: true });
  });
  main.addEventListener("focusout", () => { if (!kept) close(); });
  addEventListener("scroll", () => { if (kept && cursor) close(); }, { passive: true });
  addEventListener("keydown", keys);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") { close(); return; }
  if (event.target.matches("input, select")) return;
  const key = event.key;
  if (key === "/") { event.preventDefault(); byId("query").focus(); }
  else if (key === "[") go(state.step - 1);
  else if (key === "]") go(state.step + 1);
  else if (key === "j" || key === "k") toCard(key === "j" ? 1 : -1);
  else if (key === "n" || key === "p") { event.preventDefault(); toFar(key === "n" ? 1 : -1); }
  else inAnswer(event);
}

function inAnswer(event) {
  const article = event.target.closest?.(".card");
  if (!article || !event.target.matches(".tokens")) return;
  const answer = step.answers[article.dataset.n], at = cursor?.answer === answer ? cursor.at : answer.from - 1;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: answer.from, End: answer.stop - 1, Enter: at }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  open(answer, Math.max(answer.from, Math.min(to, answer.stop - 1)), { speak: true, keep: event.key === "Enter" });
}

const focused = () => {
  const article = document.activeElement?.closest?.(".card");
  return article ? shown.findIndex((a) => a.number === Number(article.dataset.n)) : -1;
};

function show(answer, at) {
  spanAt(answer, at);
  document.querySelector(`.card[data-n="${answer.number}"] .tokens`).focus({ preventScroll: true });
  open(answer, at, { speak: true });
}

function toCard(by) {
  const to = shown[Math.max(0, Math.min(shown.length - 1, focused() + by))];
  if (to && to.tokens) show(to, to.from);
}

/* To the next of the tokens that are underlined, in this answer or a later one. */
function toFar(by) {
  let n = Math.max(0, focused()), at = cursor ? cursor.at + by : null;
  for (; n >= 0 && n < shown.length; n += by, at = null) {
    const answer = shown[n];
    for (let i = at ?? (by > 0 ? answer.from : answer.stop - 1); i >= answer.from && i < answer.stop; i += by) {
      if (Math.abs(drawn.values[i]) >= drawn.far) { show(answer, i); return; }
    }
  }
}

begin();
performance.measure("opened", { start: began, end: performance.now() });
})();
