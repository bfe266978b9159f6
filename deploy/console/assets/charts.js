// Curves over time by uPlot, with what happened drawn as marks. Lines differ by dash as well as by colour.

import { html, useEffect, useRef } from "./preact.js";
import { clock, shortClock } from "./words.js";

export const MARKS = {
  swap: { sign: "S", name: "swap" },
  rollback: { sign: "B", name: "rollback" },
  retrain: { sign: "R", name: "fine-tune" },
  alarm: { sign: "!", name: "alarm" },
};

const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [4, 2]];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function drawn(marks) {
  return (plot) => {
    const { ctx, bbox } = plot;
    const size = devicePixelRatio;
    ctx.save();
    ctx.font = `bold ${11 * size}px system-ui, sans-serif`;
    ctx.textAlign = "center";
    let free = -Infinity;
    for (const mark of marks) {
      const x = plot.valToPos(mark.at, "x", true);
      if (x < bbox.left || x > bbox.left + bbox.width) continue;
      ctx.strokeStyle = ctx.fillStyle = css(mark.kind === "alarm" ? "--alarm" : "--mark");
      ctx.lineWidth = size;
      ctx.setLineDash(mark.kind === "retrain" ? [2 * size, 3 * size] : []);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + bbox.height);
      ctx.stroke();
      if (x - free > 12 * size) {
        ctx.fillText(MARKS[mark.kind]?.sign ?? "·", x, bbox.top - 3 * size);
        free = x;
      }
    }
    ctx.restore();
  };
}

/**
 * A chart. `curve` has a column `t` and one for each of `lines` ({key, name, colour}); `show` writes a value, `tick` one
 * on the axis; `range` fixes the scale.
 */
export function Chart({ title, curve, lines, marks = [], show, tick = show, range, empty }) {
  const box = useRef();
  const plot = useRef();
  const shown = useRef(marks);
  shown.current = marks;
  const there = curve && curve.t.length > 1;
  const data = there ? [curve.t, ...lines.map((line) => curve[line.key])] : null;
  useEffect(() => {
    if (!there) return undefined;
    const make = () => {
      plot.current?.destroy();
      const grid = { stroke: css("--grid"), width: 1 };
      const axis = { stroke: css("--dim"), grid, ticks: grid, font: "11px system-ui, sans-serif" };
      plot.current = new uPlot(
        {
          width: Math.max(200, box.current.clientWidth),
          height: 170,
          legend: { show: false },
          cursor: { drag: { x: false, y: false } },
          padding: [14, 8, 0, 0],
          scales: { y: range ? { range } : {} },
          axes: [
            { ...axis, space: 70, values: (u, ticks) => ticks.map((at) => shortClock(at, u.scales.x.max - u.scales.x.min)) },
            { ...axis, size: 56, values: (_, ticks) => ticks.map(tick) },
          ],
          series: [
            {},
            ...lines.map((line, i) => ({
              stroke: css(line.colour),
              width: i === 0 ? 2 : 1.5,
              dash: DASHES[i % DASHES.length],
              spanGaps: false,
              points: { show: false },
            })),
          ],
          hooks: { draw: [(u) => drawn(shown.current)(u)] },
        },
        data,
        box.current,
      );
      // The canvas says nothing to who cannot see it; the figure's caption does.
      box.current.querySelector(".uplot").setAttribute("aria-hidden", "true");
    };
    make();
    const size = new ResizeObserver(() => plot.current?.setSize({ width: Math.max(200, box.current.clientWidth), height: 170 }));
    size.observe(box.current);
    addEventListener("themed", make);
    return () => {
      removeEventListener("themed", make);
      size.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [there, lines.map((line) => line.key).join()]);
  useEffect(() => {
    if (there) plot.current?.setData(data);
  });
  const last = (key) => {
    const column = curve[key];
    for (let i = column.length - 1; i >= 0; i -= 1) if (column[i] != null) return column[i];
    return null;
  };
  return html`<figure class="chart">
    <figcaption>${title}</figcaption>
    ${there
      ? html`<div ref=${box} class="plot"></div>
          <ul class="legend">
            ${lines.map(
              (line, i) => html`<li><span class="swatch line${i}" data-colour=${line.colour.slice(2)}></span>${line.name} <b>${show(last(line.key))}</b></li>`,
            )}
          </ul>`
      : html`<p class="empty">${empty}</p>`}
  </figure>`;
}

/** What the marks of a page's charts mean, in words and newest first. */
export function Marks({ marks }) {
  if (!marks.length) return html`<p class="empty">Swaps, rollbacks, fine-tunes and alarms will be marked on every chart, and listed here.</p>`;
  return html`<details class="marks" open>
    <summary>What happened (marks on the charts)</summary>
    <ol>
      ${marks
        .slice(-12)
        .reverse()
        .map((mark) => html`<li><span class="sign ${mark.kind}">${MARKS[mark.kind]?.sign}</span> <time>${clock(mark.at)}</time> ${MARKS[mark.kind]?.name}: ${mark.says}</li>`)}
    </ol>
  </details>`;
}
