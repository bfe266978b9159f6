// The frame: which page is shown, whether what it shows is still true, and what has been done.

import { read, token } from "./api.js";
import { Ask, Letters, Token } from "./desk.js";
import { html, render, useEffect, useRef, useState } from "./preact.js";
import { Audit, Overview, Stream } from "./views.js";
import { clock, seconds } from "./words.js";

const EVERY = 2000;
const STALE = 10_000;
const THEME = "trimtab-theme";
const THEMES = ["auto", "light", "dark"];

function themed(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  dispatchEvent(new Event("themed"));
}

function route() {
  try {
    return location.hash.replace(/^#\/?/, "").split("/").map(decodeURIComponent);
  } catch {
    return [""];
  }
}

function App() {
  const [state, setState] = useState(null);
  const [asked, setAsked] = useState(null);
  const [heard, setHeard] = useState(Date.now());
  const [wrong, setWrong] = useState("");
  const [where, setWhere] = useState(route());
  const [told, setTold] = useState([]);
  const [giving, setGiving] = useState(false);
  const [stamp, setStamp] = useState(0);
  const [theme, setTheme] = useState(document.documentElement.dataset.theme);
  const [, tick] = useState(0);
  const main = useRef();
  useEffect(() => {
    let busy = false;
    const load = async () => {
      if (document.hidden || busy) return;
      busy = true;
      try {
        const answer = await read("state");
        setState(answer);
        setHeard(Date.now());
        setWrong("");
      } catch (error) {
        setWrong(error.message);
      }
      busy = false;
      tick((n) => n + 1);
    };
    load();
    const timer = setInterval(load, EVERY);
    const moved = () => {
      setWhere(route());
      setAsked(null); // the button "back" must not leave a question of another page open
      setGiving(false);
      main.current?.focus({ preventScroll: true });
      scrollTo(0, 0);
    };
    const dark = matchMedia("(prefers-color-scheme: dark)");
    const turned = () => dispatchEvent(new Event("themed"));
    addEventListener("hashchange", moved);
    document.addEventListener("visibilitychange", load);
    dark.addEventListener("change", turned);
    return () => {
      clearInterval(timer);
      removeEventListener("hashchange", moved);
      document.removeEventListener("visibilitychange", load);
      dark.removeEventListener("change", turned);
    };
  }, []);
  const tell = (good, message) => {
    setTold((before) => [{ id: Date.now() + Math.random(), good, message, at: Date.now() / 1000 }, ...before].slice(0, 4));
    setStamp((n) => n + 1);
  };
  const [page, name, tab = "", event = ""] = where;
  useEffect(() => {
    document.title = `${page === "stream" ? name : page === "letters" ? "Dead letters" : page === "audit" ? "What was asked" : "Streams"} – trimtab`;
  }, [page, name]);
  const silent = Date.now() - heard;
  const stale = silent > STALE || (wrong && state);
  const locked = Boolean(state?.guarded && !token.get()) || Boolean(stale) || Boolean(state?.starting);
  const turn = () => {
    const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    themed(next);
    setTheme(next);
  };
  const link = (to, title, current) => html`<a href=${to} aria-current=${current ? "page" : null}>${title}</a>`;
  return html`
    <a class="skip" href="#content" onClick=${(e) => (e.preventDefault(), main.current.focus())}>To the content</a>
    <header>
      <a class="brand" href="#/">trimtab</a>
      <nav aria-label="Pages">
        ${link("#/", "Streams", page === "" || page === "stream")} ${link("#/letters", "Dead letters", page === "letters")} ${link("#/audit", "What was asked", page === "audit")}
      </nav>
      <span class="end">
        ${state?.guarded && html`<button onClick=${() => setGiving(true)}>${token.get() ? "Token given" : "Give the token to act"}</button>`}
        <button onClick=${turn} aria-label=${`Colours: ${theme}. Change`}>${theme === "auto" ? "◐" : theme === "light" ? "☀" : "☾"}</button>
      </span>
    </header>
    <div class="banners">
      ${stale && html`<p class="banner bad" role="alert">■ No answer from the learner for ${seconds(silent / 1000)}${wrong && `: ${wrong}`}. ${state ? `What is shown is from ${clock(state.at)}; nothing can be asked for.` : ""}</p>`}
      ${!stale && state?.failure && html`<p class="banner bad" role="alert">■ The learner is ending: ${state.failure}</p>`}
      ${!stale && state && !state.starting && !state.ready && html`<p class="banner look">▲ The learner waits for ${Object.entries(state.waiting_for).map(([part, why]) => `${part} (${why})`).join(", ")}.</p>`}
      ${Object.entries(state?.troubles ?? {}).map(([topic, why]) => html`<p class="banner look">▲ ${topic.replace("_", " ")} cannot be followed: ${why}</p>`)}
      <div role="status" aria-live="polite">
        ${told.map((one) => html`<p class="banner ${one.good ? "good" : "look"}" key=${one.id}><span>${one.good ? "✓ Done" : "▲ Refused"} at ${clock(one.at)}: ${one.message}</span> <button onClick=${() => setTold(told.filter((its) => its !== one))}>Close<span class="sr"> this message</span></button></p>`)}
      </div>
    </div>
    <main id="content" tabindex="-1" ref=${main} class=${stale ? "stale" : ""}>
      ${!state
        ? html`<h1>trimtab</h1><p>${wrong || "Asking the learner…"}</p>`
        : page === "stream"
          ? html`<${Stream} key=${name} name=${name} tab=${tab} event=${event} state=${state} ask=${setAsked} tell=${tell} locked=${locked} stamp=${stamp} />`
          : page === "letters"
            ? html`<${Letters} ask=${setAsked} locked=${locked} stamp=${stamp} now=${state.at} />`
            : page === "audit"
              ? html`<${Audit} answers=${state.answers} />`
              : html`<${Overview} state=${state} />`}
    </main>
    <footer>trimtab ${state?.release}. Times are those of this browser; ${state ? `as of ${clock(state.at)}` : ""}.</footer>
    ${asked && html`<${Ask} ask=${asked} close=${() => setAsked(null)} done=${tell} />`}
    ${giving && html`<${Token} close=${() => setGiving(false)} done=${tell} />`}`;
}

themed(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
const root = document.getElementById("app");
root.textContent = "";
render(html`<${App} />`, root);
