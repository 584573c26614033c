"use strict";
// A crosshair: the step under the pointer in every chart, and what was logged there. The page reads well without it.
const reading = document.getElementById("reading");
const { marks, runs } = JSON.parse(document.getElementById("marks").textContent);
const MOST = 14; // lines of a reading
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const plots = [...document.querySelectorAll("figure .plot")].map((element) => {
  const numbers = element.closest("figure").querySelector("script");
  let data;
  const cross = document.createElement("i");
  cross.className = "cross";
  cross.hidden = true;
  element.append(cross);
  return { element, cross, read: () => (data ??= unpacked(JSON.parse(numbers.textContent))) };
});
let spot = null; // where the keyboard or the pointer is: {plot, x, y}, shares of the plot's sides

function unpacked(data) {
  if (!data.load) return data;
  const bytes = Uint8Array.from(atob(data.load), (one) => one.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  data.at = (row, column) => view.getUint16(2 * (row * data.columns + column), true) / 100;
  return data;
}

function line(text, name = "div") {
  const element = document.createElement(name);
  element.append(...[text].flat());
  return element;
}

function value(name, said, colour) {
  const row = line([line(name, "span"), said]);
  row.style.setProperty("--c", colour);
  return row;
}

function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

function curveLines(data, step) {
  const rows = data.curves.filter((curve) => curve.x.length).map((curve) => {
    const at = nearest(curve.x, step);
    return { curve, y: curve.y[at], away: Math.abs(curve.x[at] - step), x: curve.x[at] };
  });
  const reach = (data.span[1] - data.span[0]) * 0.008;
  const exact = rows.length ? rows.reduce((a, b) => (b.away < a.away ? b : a)).x : Math.round(step);
  const said = ({ curve, x, y }) => value(
    Math.abs(x - exact) <= reach ? curve.name : `${curve.name} (step ${x.toLocaleString("en")})`, number.format(y), curve.colour);
  const sorted = [...rows].sort((a, b) => b.y - a.y), half = MOST / 2;
  const shown = rows.length <= MOST ? rows.map(said) : [
    ...sorted.slice(0, half).map(said), line(`… and ${rows.length - MOST} between`, "small"), ...sorted.slice(-half).map(said)];
  return [
    line(`step ${exact.toLocaleString("en")}`, "b"),
    ...shown,
    ...marks.filter((mark) => Math.abs(mark.step - step) <= reach).slice(0, 4)
      .map((mark) => line(runs.length > 1 ? `${runs[mark.run]}: ${mark.text}` : mark.text, "p")),
  ];
}

function cellLines(data, x, y) {
  const column = Math.min(data.columns - 1, Math.floor(x * data.columns));
  const row = Math.min(data.rows.length - 1, Math.floor(y * data.rows.length));
  const wide = (data.span[1] - data.span[0]) / data.columns;
  const from = Math.floor(data.span[0] + column * wide) + 1, to = Math.max(from, Math.round(data.span[0] + (column + 1) * wide));
  const steps = from === to ? `step ${to.toLocaleString("en")}` : `steps ${from.toLocaleString("en")} to ${to.toLocaleString("en")}`;
  return [line(steps, "b"), line(`${data.rows[row]}: ${data.at(row, column).toFixed(2)} × the mean`, "span")];
}

function show() {
  const { plot, x, y } = spot, data = plot.read();
  const step = data.span[0] + x * (data.span[1] - data.span[0]);
  for (const other of plots) {
    const [first, last] = other.read().span, place = (step - first) / (last - first);
    other.cross.hidden = !(place >= 0 && place <= 1);
    other.cross.style.left = `${100 * place}%`;
  }
  reading.replaceChildren(...(data.load ? cellLines(data, x, y) : curveLines(data, step)));
  reading.hidden = false;
  const box = plot.element.getBoundingClientRect(), own = reading.getBoundingClientRect();
  const across = box.left + x * box.width, down = box.top + y * box.height;
  const left = across + 16 + own.width < innerWidth ? across + 16 : Math.max(4, across - 16 - own.width);
  reading.style.transform = `translate(${left}px, ${Math.max(4, Math.min(down - own.height - 12, innerHeight - own.height - 4))}px)`;
}

function hide() {
  spot = null;
  reading.hidden = true;
  for (const plot of plots) plot.cross.hidden = true;
}

for (const plot of plots) {
  plot.element.addEventListener("pointermove", (event) => {
    const box = plot.element.getBoundingClientRect();
    const inside = (share) => Math.min(1, Math.max(0, share));
    spot = { plot, x: inside((event.clientX - box.left) / box.width), y: inside((event.clientY - box.top) / box.height) };
    show();
  });
  plot.element.addEventListener("pointerleave", hide);
  plot.element.addEventListener("blur", hide);
  plot.element.addEventListener("keydown", (event) => {
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if (event.key === "Escape") hide();
    const data = plot.read();
    if (!right && !(down && data.load)) return;
    event.preventDefault();
    const apart = data.load ? [1 / data.columns, 1 / data.rows.length] : [0.01, 0];
    const from = spot?.plot === plot ? spot : { x: 0.5, y: data.load ? 0.5 / data.rows.length : 0.4 };
    const inside = (share) => Math.min(0.9999, Math.max(0, share));
    spot = { plot, x: inside(from.x + right * apart[0]), y: inside(from.y + down * apart[1]) };
    show();
  });
}
addEventListener("scroll", hide, { passive: true });
