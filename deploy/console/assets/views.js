// What is seen: all streams at a glance, and all of one.

import { act, read } from "./api.js";
import { Chart, Marks } from "./charts.js";
import { Labelling, Quarantine } from "./desk.js";
import { Explained } from "./event.js";
import { html, useEffect, useState } from "./preact.js";
import { ago, clock, many, number, rate, seconds, share, wholeShare } from "./words.js";

const QUESTIONS = {
  right: "Is it right?",
  moving: "Is the world moving?",
  forgetting: "Is anything forgotten?",
  running: "What is running?",
  keeping_up: "Is it keeping up?",
};
const LEVELS = { good: ["✓", "good"], look: ["▲", "look"], bad: ["■", "stopped"], none: ["○", "cannot tell"] };

const Level = ({ level }) => html`<span class="level ${level}"><span aria-hidden="true">${LEVELS[level][0]}</span> ${LEVELS[level][1]}</span>`;

const path = (stream, tab) => `#/stream/${encodeURIComponent(stream)}${tab ? `/${tab}` : ""}`;

export function Overview({ state }) {
  if (state.starting) return html`<h1>Starting</h1><${Waiting} state=${state} />`;
  return html`<h1>Streams</h1>
    <div class="cards">
      ${state.streams.map(
        (one) => html`<article class="card">
          <h2><a href=${path(one.stream)}>${one.stream}</a></h2>
          <p class="dim">${one.kind}; ${one.serving}${one.since ? ` since ${clock(one.since)}` : ""}; last answer ${ago(one.last_prediction, state.at)}</p>
          <dl class="checks">
            ${one.checks.map((check) => html`<div><dt>${QUESTIONS[check.question]}</dt><dd><${Level} level=${check.level} />: ${check.says}</dd></div>`)}
          </dl>
          ${one.fine_tune.running && html`<${Tuning} tune=${one.fine_tune} />`}
        </article>`,
      )}
    </div>
    <${Workers} workers=${state.workers} now=${state.at} />`;
}

function Waiting({ state }) {
  const waits = Object.entries(state.waiting_for);
  return html`<p>The learner is reading its database and its model.</p>
    <ul>${waits.map(([part, why]) => html`<li>${part}: ${why}</li>`)}</ul>`;
}

function Tuning({ tune }) {
  const progress = tune.progress;
  if (!tune.running) return null;
  return html`<p class="tuning">
    Fine-tune (${tune.cause})${progress ? `: ${progress.phase}, ${number(progress.done)} of ${number(progress.total)}` : ": starting"}
    <progress aria-label="Fine-tune" max=${progress?.total || 1} value=${progress?.done || 0}></progress>
    ${progress?.loss != null && html`loss ${progress.loss.toFixed(3)}`} ${progress?.seconds_left != null && html`, about ${seconds(progress.seconds_left)} left`}
  </p>`;
}

function Workers({ workers, now }) {
  return html`<section aria-labelledby="workers-title">
    <h2 id="workers-title">Workers</h2>
    ${workers.length
      ? html`<div class="scroll" tabindex="0" role="region" aria-label="Table of workers">
          <table>
            <thead><tr><th scope="col">Worker</th><th scope="col">State</th><th scope="col">Answers/s</th><th scope="col">p50</th><th scope="col">p99</th><th scope="col">Waiting</th></tr></thead>
            <tbody>
              ${workers.map(
                (one) => html`<tr>
                  <td>${one.url}</td>
                  <td><${Level} level=${one.why ? "bad" : one.at ? "good" : "none"} /> ${one.why && html`${one.why}; last seen ${ago(one.at, now)}`}</td>
                  <td>${rate(one.rate)}</td><td>${seconds(one.p50)}</td><td>${seconds(one.p99)}</td><td>${one.why ? "–" : number(one.lag)}</td>
                </tr>`,
              )}
            </tbody>
          </table>
        </div>`
      : html`<p class="empty">Name your workers' addresses in <code>learner.console.workers</code> to see their rate, latency and lag here, and which one stopped.</p>`}
  </section>`;
}

const RIVALS = [
  { key: "served", name: "served", colour: "--c1" },
  { key: "frozen", name: "frozen twin", colour: "--c2" },
  { key: "no_change", name: "no change", colour: "--c3" },
  { key: "majority", name: "majority", colour: "--c4" },
];

/** One stream, read anew every few seconds while it is looked at. */
export function Stream({ name, tab, event, state, ask, tell, locked, stamp }) {
  const [found, setFound] = useState(null);
  const [wrong, setWrong] = useState("");
  useEffect(() => {
    // What is shown stays until the next answer: a half-typed label, and what was done on this page, must outlive an action.
    let gone = false;
    const load = async () => {
      if (document.hidden) return;
      try {
        const answer = await read("stream", name);
        if (!gone) {
          setFound(answer);
          setWrong("");
        }
      } catch (error) {
        if (!gone) setWrong(error.message);
      }
    };
    load();
    const timer = setInterval(load, 3000);
    document.addEventListener("visibilitychange", load);
    return () => {
      gone = true;
      clearInterval(timer);
      document.removeEventListener("visibilitychange", load);
    };
  }, [name, stamp]);
  const tabs = [["", "Now"], ["versions", "Versions"], ["labels", found?.label_requests ? `Labels (${number(found.label_requests)} asked for)` : "Labels"]];
  return html`<h1>${name}</h1>
    <nav class="tabs" aria-label="Of this stream">
      ${tabs.map(([key, title]) => html`<a href=${path(name, key)} aria-current=${tab === key ? "page" : null}>${title}</a>`)}
    </nav>
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    ${found && tab === "" && html`<${Now} one=${found} now=${state.at} ask=${ask} locked=${locked} />`}
    ${tab === "event" && html`<${Explained} stream=${name} id=${event} locked=${locked} />`}
    ${found && tab === "versions" && html`<${Versions} one=${found} ask=${ask} locked=${locked} />`}
    ${found &&
    tab === "labels" &&
    html`<${Labelling} stream=${name} names=${found.class_names} closed=${found.closed} tell=${tell} locked=${locked} now=${state.at} />
      <${Quarantine} stream=${name} ask=${ask} locked=${locked} stamp=${stamp} />`}`;
}

function Question({ one, question, children }) {
  const check = one.checks.find((its) => its.question === question);
  return html`<section class="question" aria-labelledby=${`q-${question}`}>
    <h2 id=${`q-${question}`}>${QUESTIONS[question]}</h2>
    <p><${Level} level=${check.level} />: ${check.says}</p>
    ${children}
  </section>`;
}

function Now({ one, now, ask, locked }) {
  const { accuracy, delays, drift, pace, marks, workers } = one;
  return html`
    <${Steering} one=${one} ask=${ask} locked=${locked} />
    <div class="grid">
      <${Question} one=${one} question="right">
        <${Chart} title="Share right of 200 answers, as their labels came" curve=${accuracy.curve} lines=${RIVALS.filter((line) => line.key !== "frozen" || accuracy.now.frozen != null)}
          marks=${marks} show=${share} tick=${wholeShare} range=${[0, 1]} empty="Publish labels, or label an event by hand: each is compared with what was answered for its event." />
        <p class="dim">No change and majority answer from the labels that had arrived when the event was answered. ${accuracy.now.frozen == null && "No frozen twin is followed (learner.console.twin)."}</p>
        ${one.estimate != null &&
        html`<${Chart} title="Share right as the answers themselves suggest, before labels come" curve=${drift.curve} marks=${marks} show=${share} tick=${wholeShare} range=${[0, 1]}
            lines=${[{ key: "estimate", name: "estimate", colour: "--c1" }]} empty="The first points come within seconds." />
          <p class="dim">${one.estimate_error == null ? "How far off it is, is not known yet." : `Lately it was ${share(Math.abs(one.estimate_error))} off what labels then said.`}</p>`}
      <//>
      <${Question} one=${one} question="moving">
        <${Chart} title="Drift: distance from what was, in standard errors" curve=${drift.curve} marks=${marks} show=${(value) => (value == null ? "–" : value.toFixed(1))}
          lines=${[{ key: "input", name: "events", colour: "--c1" }, { key: "prediction", name: "answers", colour: "--c2" }, { key: "error", name: "errors", colour: "--c3" }]}
          empty="The first points come within seconds." />
        <${Chart} title="How long labels take" curve=${delays.curve} marks=${marks} show=${seconds}
          lines=${[{ key: "p50", name: "half within", colour: "--c1" }, { key: "p90", name: "90 % within", colour: "--c2" }]} empty="No label has met its event yet." />
        <p>Last label ${ago(one.last_label, now)}. ${one.new_classes.length ? html`Newest classes: ${one.new_classes.slice(0, 5).map((its, i) => html`${i ? ", " : ""}<b>${its.class}</b> (${ago(its.at, now)})`)}.` : "No class yet."}</p>
      <//>
      <${Question} one=${one} question="forgetting"><${Heat} heat=${one.heat} /><//>
      <${Question} one=${one} question="running">
        <p>${one.serving}${one.since ? `, its version since ${clock(one.since)}` : ""}${one.because && html` (${one.because})`}. ${many(one.classes, "class", "classes")}, ${many(one.labels_learned, "label")} learned, ${many(one.fine_tune.labels_since, "label")} since the last fine-tune.</p>
        ${one.shadow && html`<p>${one.shadow.version}, which it replaced, answers along: of ${many(one.shadow.seen, "label")}, ${one.version} alone was right about ${number(one.shadow.won)}, ${one.shadow.version} alone about ${number(one.shadow.lost)}.</p>`}
        <${Tuning} tune=${one.fine_tune} />
        ${one.fine_tune.requested > 0 && html`<p>${many(one.fine_tune.requested, "fine-tune")} asked for, and not begun.</p>`}
        <${Runs} runs=${one.runs} />
      <//>
      <${Question} one=${one} question="keeping_up">
        <p>Last answer ${ago(one.last_prediction, now)}. Dead letters of this stream since its workers started: ${Object.entries(one.dead_letters).map(([reason, count]) => `${reason} ${count}`).join(", ") || "none"} (<a href="#/letters">look</a>).</p>
        <${Chart} title="Answers a second, all streams" curve=${pace} marks=${marks} show=${rate}
          lines=${[{ key: "joined", name: "joined by the learner", colour: "--c1" }, ...(workers.length ? [{ key: "rate", name: "written by workers", colour: "--c2" }] : [])]} empty="The first points come within seconds." />
        <${Chart} title="Messages waiting" curve=${pace} marks=${marks} show=${number}
          lines=${[{ key: "learner_lag", name: "for the learner", colour: "--c1" }, ...(workers.length ? [{ key: "worker_lag", name: "for the workers", colour: "--c2" }] : [])]} empty="The first points come within seconds." />
        ${workers.length
          ? html`<${Chart} title="From the event's record to its answer" curve=${pace} marks=${marks} show=${seconds}
              lines=${[{ key: "p50", name: "half within", colour: "--c1" }, { key: "p99", name: "99 % within", colour: "--c2" }]} empty="The first points come within seconds." />`
          : html`<p class="empty">p50 and p99 are measured by the workers: name their addresses in <code>learner.console.workers</code>.</p>`}
      <//>
      <section class="question" aria-labelledby="q-marks"><h2 id="q-marks">Events</h2><${Marks} marks=${marks} />
        <p class="dim">Drift, rates and alarms are kept since the learner started; the rest is in its database.</p></section>
    </div>`;
}

/** What a retrain may name. The choice is kept here: a select that is drawn again falls back to its first option. */
function Named({ tune }) {
  const [strategy, setStrategy] = useState("");
  return html`<details>
    <summary>Another strategy, or a part of the events only</summary>
    <label>Strategy
      <select name="strategy" value=${strategy} onChange=${(event) => setStrategy(event.target.value)}>
        <option value="">${tune.strategy}, as in the settings</option>
        ${tune.strategies.filter((name) => name !== tune.strategy).map((name) => html`<option key=${name} value=${name}>${name}</option>`)}
      </select>
    </label>
    <label>Events observed from <input name="observed_from" type="datetime-local" step="1" /></label>
    <label>and before <input name="observed_to" type="datetime-local" step="1" /></label>
    <p class="dim">Times are those of this browser. What is left out stays for the next fine-tune.</p>
  </details>`;
}

function Steering({ one, ask, locked }) {
  const retrain = () =>
    ask({
      title: `Retrain ${one.stream}`,
      says: one.fine_tune.running ? "A fine-tune is running: this one is folded into the next." : "A fine-tune begins in a process of its own. What it makes serves only if it passes its exam.",
      verb: "Retrain",
      Fields: () => html`<${Named} tune=${one.fine_tune} />`,
      given: (form) => ({
        ...(form.get("strategy") ? { strategy: form.get("strategy") } : {}),
        ...Object.fromEntries(["observed_from", "observed_to"].filter((name) => form.get(name)).map((name) => [name, new Date(form.get(name)).toISOString()])),
      }),
      run: (given) => act(one.stream, "retrain", given),
    });
  const turn = one.paused ? "resume" : "pause";
  const hold = () =>
    ask({
      title: one.paused ? "Resume learning" : "Pause learning",
      says: one.paused ? "The newest head is served again, and follows the labels." : `${one.serving} stays in service. Labels are stored, and learned when you resume.`,
      verb: one.paused ? "Resume" : "Pause",
      run: (given) => act(one.stream, turn, given),
    });
  const back = () =>
    ask({
      title: `Roll ${one.stream} back`,
      says: `To the version that served before ${one.version}, with a head that knows what was learned since. Learning goes on. For another version see Versions.`,
      verb: "Roll back",
      danger: true,
      reach: () => read("radius", one.stream, "previous"),
      // What was shown is what is done, whoever has acted meanwhile.
      run: (given, reached) => act(one.stream, "rollback", { seen: one.serving, ...(reached ? { version: reached.target } : {}), ...given }),
    });
  return html`<p class="row steering">
    <button class="main" disabled=${locked} onClick=${retrain}>Retrain…</button>
    <button disabled=${locked} onClick=${hold}>${one.paused ? "Resume learning…" : "Pause learning…"}</button>
    <button class="danger" disabled=${locked} onClick=${back}>Roll back…</button>
  </p>`;
}

function Heat({ heat }) {
  const [all, setAll] = useState(false);
  if (!heat.classes.length) return html`<p class="empty">No label has met its answer yet. Then each class has a row here, each version a column.</p>`;
  const rows = all ? heat.classes : heat.classes.slice(0, 15);
  const step = (cell) => Math.min(4, Math.floor((5 * cell[0]) / cell[1]));
  return html`<div class="scroll" tabindex="0" role="region" aria-label="Recall of each class by version">
      <table class="heat">
        <caption>Share recognised of each class, by the version that answered; most forgotten first. A class may fall ${share(heat.budget)} below its best.</caption>
        <thead><tr><th scope="col">Class</th>${heat.versions.map((version) => html`<th scope="col">${version}</th>`)}<th scope="col">Now</th><th scope="col">Best</th></tr></thead>
        <tbody>
          ${rows.map(
            (row) => html`<tr>
              <th scope="row">${row.forgotten && html`<span class="level look"><span aria-hidden="true">▼</span> forgotten</span>`} ${row.class}</th>
              ${row.cells.map((cell) => (cell ? html`<td class="h${step(cell)}" title=${`${cell[0]} of ${cell[1]}`}>${Math.round((100 * cell[0]) / cell[1])}</td>` : html`<td class="none"><span class="sr">none</span></td>`))}
              <td>${share(row.now)}</td><td>${share(row.best)}</td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    <p class="dim">In percent; a point at its cell says of how many answers.
      ${heat.classes.length > 15 && html`<button onClick=${() => setAll(!all)}>${all ? "Show the worst 15" : `Show ${heat.classes.length} classes`}</button>`}
      ${heat.more > 0 && `${many(heat.more, "class", "classes")} more: trimtab classes list.`}</p>`;
}

function Runs({ runs }) {
  if (!runs.length) return html`<p class="empty">No fine-tune yet. Press Retrain, or set streams.NAME.triggers.</p>`;
  return html`<details><summary>Last fine-tunes</summary><ol class="plain">
    ${runs.map((run) => html`<li><time>${clock(run.requested_at)}</time> ${run.cause}: <b>${run.state}</b> ${run.version ?? ""}${run.started_at && run.finished_at ? `, ${seconds(run.finished_at - run.started_at)}` : ""} ${run.reason}</li>`)}
  </ol></details>`;
}

function Versions({ one, ask, locked }) {
  const [shown, setShown] = useState(null);
  const [wrong, setWrong] = useState("");
  const why = (version) =>
    read("version", one.stream, version).then(
      (answer) => (setShown({ version, ...answer }), setWrong("")),
      (error) => setWrong(error.message),
    );
  const promote = (row) =>
    ask({
      title: `Promote ${row.version}`,
      says: row.state === "refused" ? `It did not pass its exam: ${row.reasons.join("; ")}.` : `${row.version} is put into service instead of ${one.serving}.`,
      verb: `Promote ${row.version}`,
      danger: row.state === "refused",
      force: row.state === "refused" ? "Promote it all the same; the audit records that it was forced." : null,
      run: (given) => act(one.stream, "promote", { version: row.version, seen: one.serving, ...given }),
    });
  const back = (row) =>
    ask({
      title: `Roll back to ${row.version}`,
      says: `Its encoder comes back, with a head that knows what was learned since. ${one.serving} leaves service.`,
      verb: `Roll back to ${row.version}`,
      danger: true,
      reach: () => read("radius", one.stream, row.version),
      run: (given) => act(one.stream, "rollback", { version: row.version, seen: one.serving, ...given }),
    });
  const number_of = (version) => Number(version.slice(1).split(".")[0]);
  return html`<section aria-labelledby="versions-title">
    <h2 id="versions-title">Versions</h2>
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    <div class="scroll" tabindex="0" role="region" aria-label="Table of versions">
      <table>
        <thead><tr><th scope="col">Version</th><th scope="col">State</th><th scope="col">From</th><th scope="col">Made</th><th scope="col">Why</th><th scope="col">Do</th></tr></thead>
        <tbody>
          ${one.versions.map(
            (row) => html`<tr>
              <th scope="row">${row.version}</th>
              <td>${row.in_service ? html`<span class="level good"><span aria-hidden="true">✓</span> in service</span>` : row.state}</td>
              <td>${row.parent ?? "–"}</td><td>${clock(row.at)}</td>
              <td>${row.reasons.join("; ") || "–"}${row.unjudged.length ? ` Not judged: ${row.unjudged.slice(0, 8).join(", ")}${row.unjudged.length > 8 ? " …" : ""}.` : ""}</td>
              <td class="row">
                <button onClick=${() => why(row.version)}>Exam<span class="sr"> of ${row.version}</span></button>
                ${!row.in_service &&
                html`<button disabled=${locked} onClick=${() => (number_of(row.version) < number_of(one.version) ? back(row) : promote(row))}>
                  ${number_of(row.version) < number_of(one.version) ? "Roll back to" : "Promote"} ${row.version}…
                </button>`}
              </td>
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${shown && html`<${Exam} shown=${shown} close=${() => setShown(null)} />`}
  </section>`;
}

function Exam({ shown, close }) {
  const { verdict, lineage } = shown;
  return html`<article class="event">
    <h3>${shown.version}, from ${shown.parent ?? "nothing"}</h3>
    <p>Strategy ${lineage.strategy}, seed ${lineage.seed}, ${many(shown.classes, "class", "classes")}; asked for by ${lineage.settings?.cause ?? "nobody"}.</p>
    ${verdict
      ? html`<p><b>${verdict.promote ? "Passed" : "Did not pass"}</b> on ${many(verdict.n, "example")} it was never trained on: ${share(verdict.candidate_accuracy)} right, the champion ${share(verdict.champion_accuracy)}.</p>
          <ul>${verdict.reasons.map((reason) => html`<li>${reason}</li>`)}</ul>
          <div class="scroll" tabindex="0" role="region" aria-label="The exam, class by class">
            <table>
              <thead><tr><th scope="col">Class</th><th scope="col">Examples</th><th scope="col">Champion</th><th scope="col">Candidate</th><th scope="col">Outcome</th></tr></thead>
              <tbody>
                ${verdict.classes.map((its) => html`<tr><th scope="row">${its.label}</th><td>${its.n}</td><td>${share(its.champion_recall)}</td><td>${share(its.candidate_recall)}</td><td>${its.outcome}</td></tr>`)}
              </tbody>
            </table>
          </div>`
      : html`<p class="empty">No exam: a base version.</p>`}
    <p><button onClick=${close}>Close</button></p>
  </article>`;
}

export function Audit({ answers }) {
  return html`<h1>What was asked</h1>
    ${answers.length
      ? html`<div class="scroll" tabindex="0" role="region" aria-label="Requests and their answers">
          <table>
            <thead><tr><th scope="col">When</th><th scope="col">What</th><th scope="col">Stream</th><th scope="col">Outcome</th><th scope="col">Who</th><th scope="col">Why</th></tr></thead>
            <tbody>
              ${answers.map(
                (one) => html`<tr><td>${clock(Date.parse(one.at) / 1000)}</td><td>${one.action}</td><td>${one.stream}</td>
                  <td>${one.accepted ? html`<${Level} level="good" />` : html`<span class="level look"><span aria-hidden="true">▲</span> refused</span>`} ${one.message}</td><td>${one.who || "–"}</td><td>${one.reason || "–"}</td></tr>`,
              )}
            </tbody>
          </table>
        </div>`
      : html`<p class="empty">Nobody has asked for anything lately. All of it is kept on the topic audit.</p>`}`;
}
