// How the page asks its server. Whatever comes back is data: nothing of it is ever put into the page as markup.

const TOKEN = "trimtab-token";

export const token = {
  get: () => sessionStorage.getItem(TOKEN) || "",
  set: (value) => (value ? sessionStorage.setItem(TOKEN, value) : sessionStorage.removeItem(TOKEN)),
};

/** What went wrong, in a sentence; `status` is 0 where nothing answered. */
export class Failed extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`;
  const patience = new AbortController();
  const timer = setTimeout(() => patience.abort(), options.method === "POST" ? 90_000 : 15_000);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, signal: patience.signal, credentials: "omit", redirect: "error" });
  } catch (error) {
    throw new Failed(error.name === "AbortError" ? "the learner did not answer in time" : "the learner does not answer", 0);
  } finally {
    clearTimeout(timer);
  }
  const text = await answer.text();
  let body;
  try {
    body = JSON.parse(text);
  } catch {
    throw new Failed(`the learner answered ${answer.status}`, answer.status);
  }
  if (!answer.ok && !(answer.status === 409 && "accepted" in body)) throw new Failed(body.error || `the learner answered ${answer.status}`, answer.status);
  return body;
}

export const read = (...parts) => ask(`/console/api/${parts.map(encodeURIComponent).join("/")}`);
export const page = (stream, what, query = {}) => ask(`/streams/${encodeURIComponent(stream)}/${what}?${new URLSearchParams(query)}`);
export const letters = (reason) => ask(`/console/api/letters${reason ? `?${new URLSearchParams({ reason })}` : ""}`);

/** Ask for something, at the address that the command line uses; resolves to the answer, refused or not. */
export const act = (stream, action, body) =>
  ask(`/streams/${encodeURIComponent(stream)}/${action}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
