// What the page asks for: one dialog for what may be regretted, the desk where labels are given, quarantine, dead letters.

import { act, letters, page, read, token } from "./api.js";
import { because, Choice, Content, Requests } from "./asked.js";
import { eventPath } from "./event.js";
import { html, useEffect, useRef, useState } from "./preact.js";
import { ago, clock, many, number } from "./words.js";

const LONGEST = 128;
const WHO = "trimtab-who";

export const who = () => localStorage.getItem(WHO) || "";

/** Why a class name cannot be sent; null where it can. */
export function wrongLabel(label) {
  const length = [...label.trim()].length;
  if (!length) return "Type a class, or pick one.";
  if (length > LONGEST) return `A class has at most ${LONGEST} characters, and this has ${length.toLocaleString("en")}. Nothing was sent.`;
  return null;
}

/** A paste that no field here takes is refused before the browser lays it out. */
export const bounded = (most, told) => (event) => {
  const text = event.clipboardData?.getData("text") ?? "";
  if (text.length > most) {
    event.preventDefault();
    told(`${text.length.toLocaleString("en")} characters were pasted, and this field takes ${most.toLocaleString("en")}. Nothing was taken over.`);
  }
};

/** How far the versions reached that a rollback leaves. `found`: as the server counted it, or null while it counts. */
function Reach({ found, wrong }) {
  if (wrong) return html`<p class="wrong" role="alert">How far it reached was not counted: ${wrong}. It can be rolled back all the same.</p>`;
  if (!found) return html`<p role="status">Counting what was answered since…</p>`;
  const left = Object.keys(found.suspects);
  const since = Date.parse(found.since) / 1000;
  const labelled = found.classes.some((one) => one.right || one.wrong);
  return html`<div class="reach">
    <p>From <b>${found.in_service}</b> back to <b>${found.target}</b>. It leaves ${left.join(", ")}, in service since ${clock(since)} (${ago(since, Date.now() / 1000)}).</p>
    ${found.predictions
      ? html`<p>${left.length > 1 ? "They have" : "It has"} made <b>${found.left_out ? "at least " : ""}${many(found.predictions, "prediction")}</b>, the last at ${clock(Date.parse(found.last) / 1000)}${found.corrected ? `; ${number(found.corrected)} were corrected already` : ""}.
            ${found.left_out > 0 && ` ${many(found.left_out, "older message")} of the topic were not read; trimtab rollback ${found.stream} --since ${left[0]} --dry-run counts all.`}</p>
          <div class="scroll" tabindex="0" role="region" aria-label="Predictions by class">
            <table>
              <thead><tr><th scope="col">Class</th><th scope="col">Predictions</th>${labelled && html`<th scope="col">Labelled right</th><th scope="col">Labelled wrong</th>`}</tr></thead>
              <tbody>
                ${found.classes.map((one) => html`<tr key=${one.class}><th scope="row">${one.class ?? "(no class)"}</th><td>${number(one.predictions)}</td>${labelled && html`<td>${number(one.right)}</td><td>${number(one.wrong)}</td>`}</tr>`)}
              </tbody>
            </table>
          </div>
          ${found.more_classes > 0 && html`<p class="dim">And ${many(found.more_classes, "more class", "more classes")}.</p>`}
          <p class="dim">What was answered stays as it is. To correct it afterwards: <code>trimtab rollback ${found.stream} --since ${left[0]} --reissue</code></p>`
      : html`<p>Of them the topic of predictions has nothing.</p>`}
  </div>`;
}

/** What a fine-tune would be, class by class. */
function Would({ answer }) {
  const classes = Object.entries(answer.plan?.examples ?? {});
  return html`<p>${answer.accepted ? "" : "▲ "}${answer.message}</p>
    ${classes.length > 0 &&
    html`<div class="scroll" tabindex="0" role="region" aria-label="Examples by class">
      <table>
        <thead><tr><th scope="col">Class</th><th scope="col">Examples</th></tr></thead>
        <tbody>${classes.map(([name, count]) => html`<tr key=${name}><th scope="row">${name}</th><td>${number(count)}</td></tr>`)}</tbody>
      </table>
    </div>`}`;
}

/**
 * Asks once, with who and why for the audit. `ask`: {title, says, verb, danger, force, reach(), Fields, given(form), run({who, reason, ...}, reached)}.
 * Where there is a `reach`, nothing can be asked before it is known, or known that it cannot be. `Fields` are what it may name besides, and
 * `given` makes of them what is sent; then it can also be asked what would be done.
 */
export function Ask({ ask, close, done }) {
  const dialog = useRef();
  const [busy, setBusy] = useState(false);
  const [wrong, setWrong] = useState("");
  const [force, setForce] = useState(false);
  const [reached, setReached] = useState(null);
  const [uncounted, setUncounted] = useState("");
  const [would, setWould] = useState(null);
  useEffect(() => {
    dialog.current.showModal();
    ask.reach?.().then(setReached, (error) => setUncounted(error.message));
  }, []);
  const counting = Boolean(ask.reach) && !reached && !uncounted;
  const send = async (event) => {
    event.preventDefault();
    if (busy || counting) return;
    const form = new FormData(event.target);
    const dry = event.submitter?.name === "dry";
    const name = form.get("who").trim();
    localStorage.setItem(WHO, name);
    setBusy(true);
    setWrong("");
    try {
      const named = { ...(ask.force ? { force } : {}), ...ask.given?.(form), ...(dry ? { dry_run: true } : {}) };
      const answer = await ask.run({ who: name, reason: form.get("reason").trim(), ...named }, reached);
      if (dry) {
        setWould(answer);
        setBusy(false);
        return;
      }
      done(answer.accepted, answer.message);
      close();
    } catch (error) {
      setWrong(error.message);
      setBusy(false);
    }
  };
  return html`<dialog ref=${dialog} onClose=${close} aria-labelledby="ask-title">
    <form onSubmit=${send}>
      <h2 id="ask-title">${ask.title}</h2>
      <p>${ask.says}</p>
      ${ask.reach && html`<${Reach} found=${reached} wrong=${uncounted} />`}
      ${ask.Fields && html`<${ask.Fields} />`}
      ${ask.force && html`<label class="check"><input type="checkbox" checked=${force} onChange=${(e) => setForce(e.target.checked)} /> ${ask.force}</label>`}
      <label>Why <input name="reason" maxlength="1000" autocomplete="off" autofocus onPaste=${bounded(1000, setWrong)} /></label>
      <label>Who asks <input name="who" maxlength="200" value=${who()} autocomplete="name" onPaste=${bounded(200, setWrong)} /></label>
      <p class="dim">Both are kept on the topic audit.</p>
      ${ask.Fields && html`<div role="status">${would && html`<${Would} answer=${would} />`}</div>`}
      ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
      <p class="row">
        <button type="submit" class=${ask.danger ? "danger" : "main"} disabled=${busy || counting || (ask.force && !force)}>${busy ? "Asking…" : ask.verb}</button>
        ${ask.Fields && html`<button type="submit" name="dry" disabled=${busy}>What would it do?</button>`}
        <button type="button" onClick=${close}>Cancel</button>
      </p>
    </form>
  </dialog>`;
}

/** Where the token is given: kept in this tab only, and sent with every question. */
export function Token({ close, done }) {
  const dialog = useRef();
  const [wrong, setWrong] = useState("");
  useEffect(() => {
    dialog.current.showModal();
  }, []);
  const send = async (event) => {
    event.preventDefault();
    const before = token.get();
    try {
      const given = new FormData(event.target).get("token").trim();
      if (!/^[\x21-\x7e]{1,4096}$/.test(given)) throw new Error("That is no token: it has spaces, or characters that no header may carry.");
      token.set(given);
      if (!(await read("who")).authorised) throw new Error("That is not the token. It is in the file that learner.http.token_file names.");
      done(true, "The token is right: this tab may act until it is closed.");
      close();
    } catch (error) {
      token.set(before);
      setWrong(error.message);
    }
  };
  return html`<dialog ref=${dialog} onClose=${close} aria-labelledby="token-title">
    <form onSubmit=${send}>
      <h2 id="token-title">Token</h2>
      <label>Bearer token <input name="token" type="password" autocomplete="current-password" autofocus onPaste=${bounded(4096, setWrong)} /></label>
      <p class="dim">Kept in this tab until it is closed.</p>
      ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
      <p class="row"><button type="submit" class="main">Use it</button><button type="button" onClick=${close}>Cancel</button></p>
    </form>
  </dialog>`;
}

/** Labels by hand: what the learner asks for first, else the newest unlabelled event, or one by its id; Enter goes to the next. */
export function Labelling({ stream, names, closed, tell, locked, now }) {
  const [asked, setAsked] = useState(null);
  const [queue, setQueue] = useState(null);
  const [wanted, setWanted] = useState("");
  const [event, setEvent] = useState(null);
  const [wrong, setWrong] = useState("");
  const [name, setName] = useState(who());
  const field = useRef();
  const done = useRef(new Set()); // labelled or skipped here; the learner hears of a label a moment later
  const turn = useRef(0); // an answer that was overtaken by a later question is let go
  const look = async (id, mine = ++turn.current) => {
    setWrong("");
    try {
      const found = await read("event", stream, id);
      if (mine !== turn.current) return;
      setEvent(found);
      setWanted(id);
    } catch (error) {
      if (mine !== turn.current) return;
      setEvent(null);
      setWrong(error.message);
    }
  };
  const requests = async () => {
    const found = await read("requests", stream);
    setAsked(found);
    return found.requests;
  };
  const next = async (newest = false) => {
    const mine = ++turn.current;
    const left = (rows) => rows.filter((one) => !done.current.has(one.event_id));
    try {
      let waiting = newest ? [] : left(await requests());
      if (!waiting.length) waiting = left(await read("unlabelled", stream));
      if (mine !== turn.current) return;
      setQueue(waiting);
      if (waiting.length) await look(waiting[0].event_id, mine);
      else setEvent(null);
    } catch (error) {
      if (mine === turn.current) setWrong(error.message);
    }
  };
  useEffect(() => {
    done.current.clear();
    setEvent(null);
    setAsked(null);
    if (!locked) next();
    else requests().catch((error) => setWrong(error.message));
    const timer = setInterval(() => document.hidden || requests().catch(() => {}), 5000);
    return () => clearInterval(timer);
  }, [stream, locked]);
  // Once the event is drawn: what is typed next is its class.
  useEffect(() => {
    field.current?.focus();
  }, [event]);
  const send = async (submitted) => {
    submitted.preventDefault();
    const label = field.current.value;
    const refused = wrongLabel(label);
    if (refused) {
      setWrong(refused);
      return;
    }
    try {
      const answer = await act(stream, "label", { event_ids: [event.event_id], label: label.trim(), who: who() || "console" });
      tell(answer.accepted, answer.message);
      if (!answer.accepted) {
        setWrong(answer.message);
        return;
      }
      done.current.add(event.event_id);
      await next();
    } catch (error) {
      setWrong(error.message);
    }
  };
  const pass = () => {
    done.current.add(event.event_id);
    next();
  };
  const called = (typed) => {
    setName(typed);
    localStorage.setItem(WHO, typed.trim());
  };
  const request = event && asked?.requests.find((one) => one.event_id === event.event_id);
  return html`<${Requests} found=${asked} done=${done.current} current=${event?.event_id} open=${(id) => !locked && look(id)} now=${now} />
    <section aria-labelledby="label-title">
    <h2 id="label-title">Label an event</h2>
    ${locked
      ? html`<p class="empty">Give the token first: what is in an event is shown to those only who may act.</p>`
      : html`<form class="row" onSubmit=${(e) => (e.preventDefault(), wanted.trim() && look(wanted.trim()))}>
            <label>Event id <input value=${wanted} onInput=${(e) => setWanted(e.target.value)} onPaste=${bounded(200, setWrong)} autocomplete="off" spellcheck=${false} /></label>
            <button type="submit">Look</button>
            <button type="button" onClick=${() => next(true)}>Newest without a label</button>
            <label>Labelled by <input value=${name} onInput=${(e) => called(e.target.value)} onPaste=${bounded(200, setWrong)} maxlength="200" placeholder="console" autocomplete="name" /></label>
          </form>
          ${event &&
          html`<article class="event">
            <h3>${event.event_id}</h3>
            ${request && html`<p><b>Asked for</b>: it is ${because(request)}. Its guess is <b>${request.label ?? "nothing"}</b>, by ${request.model_version}.</p>`}
            <${Content} event=${event} />
            <p>
              ${event.answered
                ? html`Answered <b>${event.answered.label ?? "nothing"}</b> by ${event.answered.version} at ${clock(event.answered.at)}; it lies at ${event.answered.place}.`
                : "Not answered yet."}
              <a href=${eventPath(stream, event.event_id)}>Explain</a>
              ${event.said.map((one) => html`<br />${one.labeller} said <b>${one.label ?? "nothing (withdrawn)"}</b> at ${clock(one.at)}.`)}
            </p>
            <form class="row" onSubmit=${send}>
              <${Choice} key=${event.event_id} field=${field} names=${names} guess=${event.answered?.label ?? null} paste=${bounded(10_000, setWrong)} />
              <button type="submit" class="main">Label it (Enter)</button>
              <button type="button" onClick=${pass}>Skip</button>
            </form>
            <p class="dim">Type a class, or take a known one with the arrow keys. ${closed ? "This stream takes only the classes of its settings." : "A name that is not in the list is a new class."} To correct a label, send another.</p>
          </article>`}
          ${!event && queue && !queue.length && !wrong && html`<p class="empty">Every event that was answered lately has a label. Give an event's id to look at it.</p>`}`}
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
  </section>`;
}

export function Quarantine({ stream, ask, locked, stamp }) {
  const [found, setFound] = useState(null);
  const [chosen, setChosen] = useState([]);
  const [wrong, setWrong] = useState("");
  const load = () =>
    page(stream, "quarantine", { limit: 100 }).then(
      (answer) => (setFound(answer), setWrong("")),
      (error) => setWrong(error.message),
    );
  useEffect(() => {
    setChosen([]);
    load();
  }, [stream, stamp]);
  const held = { ids: chosen };
  const some = many(chosen.length, "label");
  const release = () =>
    ask({
      title: `Release ${some}`,
      says: "They are learned like new labels, and not asked about again.",
      verb: `Release ${some}`,
      run: (given) => act(stream, "release", { held, ...given }),
    });
  const drop = () =>
    ask({
      title: `Drop ${some}`,
      says: "This cannot be undone: they are deleted, and learned only if they are sent again.",
      verb: `Drop ${some}`,
      danger: true,
      run: (given) => act(stream, "drop", { held, ...given }),
    });
  const turn = (id) => setChosen(chosen.includes(id) ? chosen.filter((one) => one !== id) : [...chosen, id]);
  return html`<section aria-labelledby="quarantine-title">
    <h2 id="quarantine-title">Quarantine</h2>
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    ${found &&
    (found.labels.length
      ? html`<div class="scroll" tabindex="0" role="region" aria-label="Labels in quarantine">
            <table>
              <thead><tr><th scope="col">Choose</th><th scope="col">Event</th><th scope="col">Label</th><th scope="col">Labeller</th><th scope="col">Why</th></tr></thead>
              <tbody>
                ${found.labels.map(
                  (one) => html`<tr key=${one.id}>
                    <td><input type="checkbox" aria-label=${`Choose label ${one.id}`} checked=${chosen.includes(one.id)} onChange=${() => turn(one.id)} /></td>
                    <td>${one.event_id}</td><td>${one.label}</td><td>${one.labeller}</td><td>${one.reason} ${one.detail}</td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>
          <p class="row">
            <button onClick=${() => setChosen(chosen.length ? [] : found.labels.map((one) => one.id))}>${chosen.length ? "Choose none" : "Choose all shown"}</button>
            <button class="main" disabled=${!chosen.length || locked} onClick=${release}>Release</button>
            <button class="danger" disabled=${!chosen.length || locked} onClick=${drop}>Drop</button>
          </p>`
      : html`<p class="empty">Nothing is set aside. Labels come here when new classes come faster than the settings allow, or when their labeller is not believed.</p>`)}
  </section>`;
}

export function Letters({ ask, locked, stamp, now }) {
  const [found, setFound] = useState(null);
  const [reason, setReason] = useState("");
  const [open, setOpen] = useState(null);
  const [wrong, setWrong] = useState("");
  useEffect(() => {
    const load = () =>
      letters(reason).then(
        (answer) => (setFound(answer), setWrong("")),
        (error) => setWrong(error.message),
      );
    load();
    const timer = setInterval(load, 5000);
    return () => clearInterval(timer);
  }, [reason, stamp]);
  const look = (place) =>
    read("letter", place).then(
      (answer) => (setOpen(answer), setWrong("")),
      (error) => setWrong(error.message),
    );
  const again = (one) =>
    ask({
      title: `Send ${one.event_id || one.place} again`,
      says: `The original message goes to the topic that it came from (${one.first || "unknown"}). Mend the producer or the settings first, or it comes back. The dead letter stays where it is.`,
      verb: "Send it again",
      run: (given) => act("dead-letters", "replay", { letters: [one.place], ...given }),
    });
  return html`<section aria-labelledby="letters-title">
    <h1 id="letters-title">Dead letters</h1>
    ${wrong && html`<p class="wrong" role="alert">${wrong}</p>`}
    ${found?.trouble && html`<p class="wrong" role="alert">${found.trouble}</p>`}
    ${found &&
    (Object.keys(found.reasons).length
      ? html`<p class="row">
            <label>Reason
              <select value=${reason} onChange=${(e) => setReason(e.target.value)}>
                <option value="">all</option>
                ${Object.entries(found.reasons).map(([name, count]) => html`<option value=${name}>${name} (${count})</option>`)}
              </select>
            </label>
          </p>
          ${open &&
          html`<article class="event">
            <h2>Dead letter ${open.place}</h2>
            <p><b>${open.reason}</b>${open.field && html`, field <code>${open.field}</code>`}: ${open.detail}</p>
            <pre tabindex="0" aria-label="The message as it was">${open.content ?? "It was too large to be copied; its bytes lie at its first place."}</pre>
            <p class="row"><button class="main" disabled=${locked} onClick=${() => again(open)}>Send it again</button><button onClick=${() => setOpen(null)}>Close</button></p>
          </article>`}
          <div class="scroll" tabindex="0" role="region" aria-label="Newest dead letters">
            <table>
              <thead><tr><th scope="col">When</th><th scope="col">Reason</th><th scope="col">Event</th><th scope="col">What</th><th scope="col">Place</th></tr></thead>
              <tbody>
                ${found.letters.map(
                  (one) => html`<tr key=${one.place}>
                    <td>${one.at ? ago(Date.parse(one.at) / 1000, now) : "–"}</td><td>${one.reason}</td><td>${one.event_id}</td><td>${one.field} ${one.detail}</td>
                    <td><button disabled=${locked} onClick=${() => look(one.place)}>Look at ${one.place}</button></td>
                  </tr>`,
                )}
              </tbody>
            </table>
          </div>`
      : html`<p class="empty">There are none. What a worker or the learner cannot use is kept here whole, with the reason.</p>`)}
  </section>`;
}
