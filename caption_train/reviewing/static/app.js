// Puts the page together: filters, keys, and what happens between the grid and the single view.

import { Refused, forget, get, post, remember } from "./api.js";
import { ReplaceDialog, describe, showFinish, showHelp, showHistory } from "./dialogs.js";
import { Grid } from "./grid.js";
import { Single } from "./single.js";

const by = (id) => document.getElementById(id);
const KEYS = [
  ["← → ↑ ↓", "all images", "move; with Shift select"],
  ["Home End PageUp PageDown", "all images", "move far"],
  ["Enter", "all images", "open the image"],
  ["Space", "all images", "select it"],
  ["Ctrl+A", "all images", "select all that are shown"],
  ["/", "all images", "search in captions"],
  ["a", "both", "accept the caption, or take it back"],
  ["f", "both", "flag, or take it back"],
  ["j k", "one image", "next, previous; what was typed is saved"],
  ["e", "one image", "edit the caption"],
  ["t", "one image", "add a tag"],
  ["Ctrl+S", "one image", "save"],
  ["Ctrl+Enter", "one image", "save, accept, next"],
  ["g", "one image", "ask for a suggestion, or another"],
  ["y i n", "one image", "accept, edit, reject the suggestion"],
  ["r", "both", "find and replace"],
  ["u", "both", "undo the last step"],
  ["h", "both", "history"],
  ["Esc", "both", "leave the field, the image, the selection"],
  ["?", "both", "this list"],
];

function say(text, isBad = false) {
  by("message").textContent = text;
  by("message").classList.toggle("bad", isBad);
}

async function guard(act) {
  try {
    return await act();
  } catch (error) {
    if (!(error instanceof Refused)) throw error;
    say(error.message, true);
  }
}

const grid = new Grid(by("grid"), by("space"), { onOpen: (place) => guard(() => open(place)), onSelect: showSelection });
const single = new Single({ say, onChange: () => guard(showState), ids: () => grid.ids });
const replacing = new ReplaceDialog({
  guard,
  scope: () => {
    if (!by("single").hidden) return { ids: [single.id], isSelection: true };
    return grid.selected.size ? { ids: [...grid.selected], isSelection: true } : { ids: grid.ids, isSelection: false };
  },
  onDone: (text, isBad) => guard(async () => {
    await reload();
    say(text, isBad);
  }),
});
const isSingle = () => !by("single").hidden;

async function showState(given) {
  const state = given || (await get("state"));
  by("title").textContent = state.folder;
  document.title = `${state.folder}: review captions`;
  by("bar").max = Math.max(1, state.total);
  by("bar").value = state.accepted;
  const number = (count) => count.toLocaleString();
  by("counts").textContent =
    `${number(state.accepted)} of ${number(state.total)} accepted, ${number(state.total - state.captioned)} without a caption`;
  by("do-undo").disabled = !state.undo;
  by("do-undo").title = state.undo ? `${state.undo.action}: ${state.undo.name}` : "";
  return state;
}

function query() {
  const values = { contains: by("contains").value, tag: by("tag").value, state: by("state").value };
  if (by("longer").value) Object.assign(values, { longer_than: by("longer").value, unit: by("unit").value });
  return values;
}

let asked = 0;
async function filter() {
  const mine = ++asked;
  const { ids } = await get("ids", query());
  if (mine !== asked) return;
  grid.show(ids);
  by("nothing").hidden = ids.length > 0;
  by("grid").hidden = !ids.length;
  by("found").textContent = `${ids.length.toLocaleString()} shown`;
  say("");
}

// After a step that changed many captions.
async function reload() {
  forget();
  await showState();
  if (isSingle()) await single.open(single.place);
  else await filter();
}

function showSelection() {
  by("selection").hidden = !grid.selected.size;
  by("selected").textContent = `${grid.selected.size.toLocaleString()} selected`;
}

async function open(place) {
  if (place < 0 || place >= grid.ids.length) return;
  grid.current = place;
  by("overview").hidden = true;
  by("single").hidden = false;
  await single.open(place);
  by("close").focus();
}

// A report on the dataset links here with #item=ID.
async function openLinked() {
  const id = new URLSearchParams(location.hash.slice(1)).get("item");
  if (!id) return;
  history.replaceState(null, "", location.pathname);
  if (isSingle() && !(await single.leave())) return;
  if (!grid.ids.includes(id)) {
    by("filters").reset();
    await filter();
  }
  if (grid.ids.includes(id)) await open(grid.ids.indexOf(id));
  else say("The image of this link is not in the folder that this page shows", true);
}

async function close() {
  if (!(await single.leave())) return;
  grid.current = single.place;
  by("single").hidden = true;
  by("overview").hidden = false;
  single.id = null;
  grid.reveal();
  by("grid").focus();
}

async function undo(batch) {
  if (isSingle() && single.isDirty) {
    say("Save what you typed first, then undo", true);
    return;
  }
  const answer = await post("undo", batch ? { batch } : {});
  await reload();
  say(describe(`Undone ${answer.undone.action}`, answer), answer.kept_count > 0);
}

async function markSelected(name) {
  const ids = grid.selected.size ? [...grid.selected] : grid.ids.slice(grid.current, grid.current + 1);
  if (!ids.length) return;
  // The server knows of all of them whether they are marked, the page of those that were on the screen.
  const { items } = await post("mark", { ids, toggle: name });
  if (items.length < ids.length) forget();
  remember(items);
  grid.draw();
  await showState();
}

const inSingle = {
  j: () => single.go(1),
  k: () => single.go(-1),
  ArrowRight: () => single.go(1),
  ArrowLeft: () => single.go(-1),
  e: () => by("caption").focus(),
  t: () => by("new-tag").focus(),
  a: () => single.accept(),
  f: () => single.flag(),
  g: () => !by("suggestions").hidden && !by("suggest").disabled && single.suggest(),
  y: () => single.take(),
  i: () => single.editSuggestion(),
  n: () => single.reject(),
  Escape: () => close(),
};
const inGrid = {
  Enter: () => open(grid.current),
  " ": () => grid.toggle(),
  a: () => markSelected("accepted"),
  f: () => markSelected("flagged"),
  "/": () => by("contains").focus(),
  Escape: () => grid.select([]),
};
const anywhere = {
  r: async () => {
    if (!isSingle() || (await single.leave())) replacing.open();
  },
  u: () => undo(),
  h: () => showHistory({ guard, onUndo: undo }),
  "?": () => showHelp(KEYS),
};
const moves = {
  ArrowRight: () => 1,
  ArrowLeft: () => -1,
  ArrowDown: () => grid.columns,
  ArrowUp: () => -grid.columns,
  PageDown: () => grid.columns * grid.rowsOnPage(),
  PageUp: () => -grid.columns * grid.rowsOnPage(),
  Home: () => -grid.ids.length,
  End: () => grid.ids.length,
};

function pressControl(event) {
  if (isSingle() && event.key === "s") return () => single.save();
  if (isSingle() && event.key === "Enter") return () => single.acceptAndGo();
  if (!isSingle() && event.key === "a" && !event.target.matches("input")) return () => grid.select(grid.ids);
  return null;
}

function findAct(event) {
  if (event.ctrlKey || event.metaKey) return event.altKey ? null : pressControl(event);
  if (event.altKey) return null;
  const isField = event.target.matches("input, textarea, select");
  if (isField) return event.key === "Escape" ? () => (isSingle() ? by("close") : by("grid")).focus() : null;
  // A button's own keys are its own.
  if (event.target.matches("button") && (event.key === "Enter" || event.key === " ")) return null;
  if (!isSingle() && moves[event.key]) return () => grid.move(moves[event.key](), event.shiftKey);
  return (isSingle() ? inSingle : inGrid)[event.key] || anywhere[event.key];
}

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.isComposing) return;
  const act = findAct(event);
  if (!act) return;
  event.preventDefault();
  guard(act);
});

let typing = 0;
by("filters").addEventListener("input", () => {
  clearTimeout(typing);
  typing = setTimeout(() => guard(filter), 150);
});
by("filters").addEventListener("submit", (event) => event.preventDefault());
by("tag").addEventListener("focus", () => guard(async () => {
  const { tags } = await get("tags");
  by("all-tags").replaceChildren(...tags.map(([tag, count]) => Object.assign(new Option(`${count}`, tag))));
}));
const clicks = {
  "do-replace": anywhere.r,
  "do-undo": anywhere.u,
  "do-history": anywhere.h,
  "do-help": anywhere["?"],
  "do-finish": () => showFinish(),
  "accept-selected": inGrid.a,
  "flag-selected": inGrid.f,
  "replace-selected": anywhere.r,
  "clear-selected": inGrid.Escape,
  close: () => close(),
};
for (const [id, act] of Object.entries(clicks)) by(id).addEventListener("click", () => guard(act));

let seen = Date.now();
document.addEventListener("visibilitychange", () => {
  if (document.hidden || isSingle() || Date.now() - seen < 5000) return;
  seen = Date.now();
  guard(async () => {
    await showState(await post("refresh"));
    forget();
    await filter();
  });
});
addEventListener("beforeunload", (event) => {
  if (isSingle() && single.isDirty) event.preventDefault();
});

guard(async () => {
  const [state] = await Promise.all([showState(), filter()]);
  if (state.model) {
    by("suggestions").hidden = false;
    by("prompt").value = state.model.prompt;
    by("unit").add(new Option("tokens"));
  }
  by("grid").focus();
  if (state.notes.length) say(state.notes.slice(0, 3).join("; "));
  await openLinked();
});
addEventListener("hashchange", () => guard(openLinked));
