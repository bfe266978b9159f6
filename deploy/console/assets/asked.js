// Labels that the learner asks for: the list of them, the event as a person reads it, and the field where its class is given.

import { html, useState } from "./preact.js";
import { ago, many, number } from "./words.js";

const WHY = { novel: "unlike what it knows", uncertain: "torn between two classes" };
const CHOICES = 8;

export const because = (request) => WHY[request.why] ?? request.why;

/** The open requests, best first; `open` looks at one of them. */
export function Requests({ found, done, current, open, now }) {
  if (!found) return null;
  const rows = found.requests.filter((one) => !done.has(one.event_id));
  const empty = found.per_day
    ? "Nothing is asked for now. The learner asks for events that are unlike what it knows, or that lie between two classes."
    : "This stream asks for no labels: streams.NAME.label_requests.per_day is 0.";
  return html`<section aria-labelledby="requests-title">
    <h2 id="requests-title">Labels asked for</h2>
    ${rows.length
      ? html`<div class="scroll" tabindex="0" role="region" aria-label="Open label requests">
          <table>
            <thead><tr><th scope="col">Rank</th><th scope="col">Event</th><th scope="col">Why</th><th scope="col">Its guess</th><th scope="col">Asked</th></tr></thead>
            <tbody>
              ${rows.map(
                (one, at) => html`<tr key=${one.event_id} aria-current=${one.event_id === current ? "true" : null}>
                  <td>${at + 1}</td>
                  <td><button onClick=${() => open(one.event_id)}>${one.event_id}</button></td>
                  <td>${because(one)} (${one.score.toFixed(2)})</td><td>${one.label ?? "none"}</td><td>${ago(Date.parse(one.asked_at) / 1000, now)}</td>
                </tr>`,
              )}
            </tbody>
          </table>
        </div>`
      : html`<p class="empty">${empty}</p>`}
    <p class="dim">${many(found.open, "request")} open, ${number(found.answered)} answered; ${number(found.left)} of ${number(found.per_day)} left for 24 hours.${found.open > found.requests.length && ` The first ${number(found.requests.length)} are shown; all of them: trimtab requests.`}</p>
  </section>`;
}

/** An event as its labeller needs it: the text itself, or a line for each channel; the whole message below. */
export function Content({ event }) {
  const { seen, content } = event;
  if (content == null) return html`<p class="empty">${event.why}</p>`;
  if (!seen) return html`<pre tabindex="0" aria-label="The event">${content}</pre>`;
  const whole = (name) => html`<details><summary>The whole message</summary><pre tabindex="0" aria-label=${name}>${content}</pre></details>`;
  if (seen.text != null)
    return html`<pre tabindex="0" aria-label="The event">${seen.text}</pre>
      ${seen.more > 0 && html`<p class="dim">${many(seen.more, "more character")}.</p>`}
      ${whole("As it was sent")}`;
  return html`<ul class="waves">${seen.channels.map((one) => html`<li key=${one.name}><${Wave} one=${one} /></li>`)}</ul>
    ${seen.more > 0 && html`<p class="dim">${many(seen.more, "more channel")}.</p>`}
    ${whole("The event")}`;
}

function Wave({ one }) {
  const there = one.values.filter((value) => value != null);
  if (!there.length) return html`${one.name}: <span class="dim">no value</span>`;
  const low = Math.min(...there);
  const high = Math.max(...there);
  const short = (value) => Number(value.toPrecision(4)).toString();
  const says = low === high ? `${short(low)} throughout` : `${short(low)} to ${short(high)}`;
  const last = Math.max(1, one.values.length - 1);
  // Divided first: the difference of two very large values may be more than a number can be.
  const height = (value) => (low === high ? 20 : 38 - (36 * (value / 2 - low / 2)) / (high / 2 - low / 2));
  let pen = "M";
  const line = one.values.map((value, at) => {
    const step = value == null ? "" : `${pen}${((200 * at) / last).toFixed(1)} ${height(value).toFixed(1)}`;
    pen = value == null ? "M" : "L";
    return step;
  });
  return html`${one.name} <span class="dim">${says}</span>
    <svg viewBox="0 0 200 40" preserveAspectRatio="none" role="img" aria-label=${`${one.name}: ${says}`}><path d=${line.join("")} /></svg>`;
}

/** A class for an event: type one, or take a known one with the arrow keys. Enter is its form's. */
export function Choice({ field, names, guess, paste }) {
  const [typed, setTyped] = useState("");
  const [at, setAt] = useState(-1);
  const wanted = typed.trim().toLowerCase();
  const ordered = guess == null ? names : [guess, ...names.filter((name) => name !== guess)];
  const options = ordered.filter((name) => name.toLowerCase().includes(wanted)).slice(0, CHOICES);
  const take = (index) => {
    field.current.value = options[index] ?? typed;
    setAt(index);
  };
  const move = (event) => {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || !options.length || event.isComposing) return;
    event.preventDefault();
    // One place more than there are options: there is what was typed.
    const places = options.length + 1;
    take(((at + 1 + step + places) % places) - 1);
  };
  return html`<div class="choice">
    <label>Its class
      <input ref=${field} role="combobox" aria-expanded=${String(options.length > 0)} aria-controls="classes" aria-autocomplete="list"
        aria-activedescendant=${at < 0 ? null : `class-${at}`} autocomplete="off" spellcheck=${false}
        onInput=${(event) => (setTyped(event.target.value), setAt(-1))} onKeyDown=${move} onPaste=${paste} />
    </label>
    <ul id="classes" role="listbox" aria-label="Known classes" hidden=${!options.length}>
      ${options.map(
        (name, index) => html`<li id=${`class-${index}`} key=${name} role="option" aria-selected=${String(index === at)} onMouseDown=${(event) => event.preventDefault()} onClick=${() => take(index)}>
          ${name}${name === guess && html` <span class="dim">its guess</span>`}
        </li>`,
      )}
    </ul>
  </div>`;
}
