// One event explained: every answer to it, what speaks for them, its labels, and who learned from it.

import { read } from "./api.js";
import { html, useEffect, useState } from "./preact.js";
import { clock, share } from "./words.js";

export const eventPath = (stream, id) => `#/stream/${encodeURIComponent(stream)}/event/${encodeURIComponent(id)}`;

const shares = (probabilities) => Object.entries(probabilities).map(([name, its]) => `${name} ${share(its)}`).join(", ") || "no class";

const Table = ({ title, columns, rows, none }) => html`<section aria-label=${title}>
  <h3>${title}</h3>
  ${rows.length
    ? html`<div class="scroll" tabindex="0" role="region" aria-label=${`Table: ${title}`}>
        <table>
          <thead><tr>${columns.map((name) => html`<th scope="col">${name}</th>`)}</tr></thead>
          <tbody>${rows.map((row) => html`<tr>${row.map((cell) => html`<td>${cell}</td>`)}</tr>`)}</tbody>
        </table>
      </div>`
    : html`<p class="empty">${none}</p>`}
</section>`;

function Learned({ one }) {
  const { learned, scored } = one;
  const what = !learned
    ? "Nothing is learned of it."
    : learned.exam
      ? `${learned.label}: it is in the exam, so no head and no fine-tune is taught by it.`
      : `${learned.label}, since ${clock(learned.at)}.`;
  return html`<p>${what} ${scored && html`Its label is <b>${scored.label}</b>, and ${scored.predicted ?? "nothing"} was served: ${scored.right ? "right" : "wrong"}.`}
      ${one.settled && " Its label can no longer be corrected."}</p>
    <${Table} title="Taught to the head" columns=${["When", "", "Class", "First revision with it"]} none="The head was never taught it, or the ledger no longer tells."
      rows=${one.taught.map((its) => [clock(its.at), its.added ? "added" : "taken back", its.label, its.revision ?? "–"])} />
    <${Table} title="Versions trained on it" columns=${["Version", "State", "How"]} none="No version's encoder was trained on it."
      rows=${one.trained.map((its) => [its.version, its.state, its.own ? "in its own run" : "by an ancestor"])} />`;
}

export function Explained({ stream, id, locked }) {
  const [one, setOne] = useState(null);
  const [wrong, setWrong] = useState("");
  useEffect(() => {
    let gone = false;
    setOne(null);
    setWrong("");
    if (locked) return undefined;
    read("explain", stream, id).then(
      (answer) => !gone && setOne(answer),
      (error) => !gone && setWrong(error.message),
    );
    return () => {
      gone = true;
    };
  }, [stream, id, locked]);
  return html`<section aria-labelledby="event-title">
    <h2 id="event-title">Event ${id}</h2>
    ${locked && html`<p class="empty">Give the token first: what is in an event is shown to those only who may act.</p>`}
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    ${!locked && !one && !wrong && html`<p>Looking through the topics…</p>`}
    ${one &&
    html`${one.content != null ? html`<pre tabindex="0" aria-label="The event">${one.content}</pre>` : html`<p class="empty">${one.why}</p>`}
      ${one.answered && html`<p class="dim">It lies at ${one.answered.place}.</p>`}
      <${Table} title="Answers" columns=${["When", "Class", "Revision", "Probabilities", "Novelty", "Corrects", "Place", "Asked again"]} none="No answer was found."
        rows=${one.predictions.map((its) => [clock(its.at), its.label ?? "nothing", its.version, shares(its.probabilities), share(its.novelty), its.supersedes ?? "", its.place, its.again.told])} />
      ${one.now && html`<p>Now ${one.now.version} would say ${shares(one.now.probabilities)}; novelty ${share(one.now.novelty)}.</p>`}
      <${Table} title="Most like it, of what was learned" columns=${["Cosine", "Class", "", "Event", "What it says"]} none=${one.unlike}
        rows=${one.nearest.map((its) => [its.similarity.toFixed(3), its.label, its.for ? "for" : "against", html`<a href=${eventPath(stream, its.event_id)}>${its.event_id}</a>`, its.content ?? "let go of by the store"])} />
      <${Table} title="Labels as they came" columns=${["When", "Labeller", "Class", "Place"]} none="No label was found."
        rows=${one.labels.map((its) => [clock(its.at), its.labeller, its.label ?? "withdrawn", its.place])} />
      ${one.aside.map((its) => html`<p>In quarantine: ${its.label} by ${its.labeller} (${its.reason}). ${its.detail}</p>`)}
      <h3>Learned</h3>
      <${Learned} one=${one} />
      ${one.letters.length > 0 &&
      html`<${Table} title="Dead letters" columns=${["When", "Reason", "What"]} none="" rows=${one.letters.map((its) => [its.at.slice(0, 19), its.reason, `${its.field} ${its.detail}`])} />`}
      <p class="dim">${one.looked.join("; ")}. More: <code>trimtab explain --all</code></p>`}
  </section>`;
}
