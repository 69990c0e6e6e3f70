const $ = id => document.getElementById(id);
const NS = "http:" + "//www.w3.org/2000/svg";
const el = (name, text, parent) => { const e = document.createElement(name); if (text != null) e.textContent = text; if (parent) parent.append(e); return e; };
const svg = (name, attrs, parent) => { const e = document.createElementNS(NS, name); for (const k in attrs) e.setAttribute(k, attrs[k]); if (parent) parent.append(e); return e; };
const fig = x => x == null ? "–" : x !== 0 && (Math.abs(x) >= 1e5 || Math.abs(x) < 1e-3) ? x.toExponential(2) : String(+x.toPrecision(4));
const time = s => s < 90 ? s.toFixed(0) + " s" : s < 5400 ? (s / 60).toFixed(1) + " min" : (s / 3600).toFixed(1) + " h";
const bytes = b => b >= 2 ** 30 ? (b / 2 ** 30).toFixed(2) + " GiB" : (b / 2 ** 20).toFixed(0) + " MiB";
const last = a => { for (let i = a.length - 1; i >= 0; i--) if (a[i] != null) return a[i]; return null; };

/* Steps of 1, 2 or 5 times a power of ten. */
function ticks(lo, hi, want) {
  const raw = (hi - lo) / want || 1, ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * ten).find(s => s >= raw);
  const out = [];
  for (let t = Math.ceil(lo / step) * step; t <= hi + step * 1e-9; t += step) out.push(+t.toPrecision(12));
  return out;
}

/* Mean over a window that grows with the number of points. */
function smoothed(ys) {
  const w = Math.max(1, Math.round(ys.length / 60)), out = [];
  let sum = 0, n = 0;
  ys.forEach((y, i) => {
    if (y != null) { sum += y; n++; }
    if (i >= w && ys[i - w] != null) { sum -= ys[i - w]; n--; }
    out.push(n ? sum / n : null);
  });
  return out;
}

function tile(name, text) { const t = el("div", null, $("tiles")); t.className = "tile"; el("b", text, t); el("span", name, t); }

function table(title, head, rows, kind) {
  if (!rows.length) return;
  el("h2", title, $("rest"));
  const t = el("table", null, $("rest"));
  if (kind) t.className = kind;
  if (head) { const tr = el("tr", null, t); head.forEach(h => el("th", h, tr)); }
  for (const r of rows) { const tr = el("tr", null, t); r.forEach(c => el("td", c, tr)); }
}

/* Shows the data, and on a live page every other second what its server says then. */
function watch(data, show) {
  show(data);
  if (data.live) setInterval(async () => {
    try { data = Object.assign(await (await fetch("run.json")).json(), { live: true }); } catch { data.lost = true; }
    show(data);
  }, 2000);
}
