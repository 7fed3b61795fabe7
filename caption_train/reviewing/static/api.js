// Asks the server. Whatever it says is data, never markup: it is shown through textContent alone.

const token = document.querySelector('meta[name="page-token"]').content;

export class Refused extends Error {}

async function read(response) {
  let content;
  try {
    content = await response.json();
  } catch {
    throw new Refused(`the server answered ${response.status} without a reason`);
  }
  if (!response.ok && response.status !== 409) throw new Refused(content.error || `error ${response.status}`);
  return content;
}

async function ask(address, settings) {
  let response;
  try {
    response = await fetch(address, settings);
  } catch {
    throw new Refused("the server does not answer; was it stopped?");
  }
  return read(response);
}

export function get(name, values = {}) {
  return ask(`/api/${name}?${new URLSearchParams(values)}`);
}

export function post(name, values = {}) {
  return ask(`/api/${name}`, {
    method: "POST",
    headers: { "content-type": "application/json", "x-review-token": token },
    body: JSON.stringify(values),
  });
}

const items = new Map();
const wanted = new Set();
const listeners = [];
let timer = 0;
const PAGE = 100;

export function onItems(listener) {
  listeners.push(listener);
}

export function known(id) {
  return items.get(id);
}

export function remember(news) {
  for (const item of news) items.set(item.id, item);
  for (const listener of listeners) listener(news);
}

export function forget() {
  items.clear();
}

// Asked for together: scrolling wants many at once.
export function want(ids) {
  for (const id of ids) if (!items.has(id)) wanted.add(id);
  if (wanted.size && !timer) timer = setTimeout(fetchWanted, 20);
}

async function fetchWanted() {
  // The newest first: what was scrolled past may come later.
  const ids = [...wanted].slice(-PAGE);
  ids.forEach((id) => wanted.delete(id));
  try {
    remember((await get("items", { ids: ids.join(",") })).items);
  } catch (error) {
    wanted.clear();
    if (!(error instanceof Refused)) throw error;
  }
  timer = wanted.size ? setTimeout(fetchWanted, 0) : 0;
}
