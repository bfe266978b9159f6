// Numbers and times as people read them.

export const share = (value) => (value == null ? "–" : `${(100 * value).toFixed(1)} %`);
export const number = (value) => (value == null ? "–" : Math.round(value).toLocaleString("en"));
export const rate = (value) => (value == null ? "–" : value < 10 ? value.toFixed(1) : number(value));

export function seconds(value) {
  if (value == null) return "–";
  if (value < 0) return `−${seconds(-value)}`;
  if (value < 0.001) return `${(value * 1e6).toFixed(0)} µs`;
  if (value < 1) return `${(value * 1e3).toFixed(value < 0.01 ? 1 : 0)} ms`;
  if (value < 120) return `${value.toFixed(value < 10 ? 1 : 0)} s`;
  if (value < 7200) return `${(value / 60).toFixed(0)} min`;
  if (value < 172800) return `${(value / 3600).toFixed(1)} h`;
  return `${(value / 86400).toFixed(1)} days`;
}

export const ago = (at, now) => (at == null ? "never" : now - at < 1 ? "just now" : `${seconds(Math.max(0, now - at))} ago`);

export function clock(at) {
  if (at == null) return "–";
  const date = new Date(at * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}

/** A time on an axis that spans so many seconds. */
export function shortClock(at, span) {
  const date = new Date(at * 1000);
  if (span > 4 * 86_400) return date.toLocaleDateString("en-CA").slice(5);
  const time = date.toLocaleTimeString("en-GB");
  return span > 86_400 ? `${date.toLocaleDateString("en-CA").slice(5)} ${time.slice(0, 5)}` : span > 900 ? time.slice(0, 5) : time;
}

export const wholeShare = (value) => `${Math.round(100 * value)} %`;
export const many = (count, one, more = `${one}s`) => `${number(count)} ${count === 1 ? one : more}`;
