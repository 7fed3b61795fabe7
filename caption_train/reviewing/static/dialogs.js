// Find and replace, history, the end, and the list of keys.

import { Refused, get, post } from "./api.js";

const by = (id) => document.getElementById(id);

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

// What is cut off at both ends is the same in both texts.
function difference(before, after) {
  let start = 0;
  while (start < before.length && before[start] === after[start]) start++;
  let end = 0;
  const most = Math.min(before.length, after.length) - start;
  while (end < most && before[before.length - 1 - end] === after[after.length - 1 - end]) end++;
  const line = document.createElement("div");
  line.append(
    before.slice(Math.max(0, start - 60), start),
    element("del", before.slice(start, before.length - end)),
    element("ins", after.slice(start, after.length - end)),
    before.slice(before.length - end, before.length - end + 60),
  );
  return line;
}

export class ReplaceDialog {
  constructor({ scope, guard, onDone }) {
    Object.assign(this, { scope, guard, onDone, token: null, asked: 0 });
    this.dialog = by("replace");
    for (const id of ["find", "with", "match-case", "whole-words"]) {
      by(id).addEventListener("input", () => this.schedule());
    }
    by("replace-go").addEventListener("click", () => guard(() => this.replace()));
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      if (event.submitter?.value === "close") return;
      event.preventDefault(); // Enter in a field
    });
    this.dialog.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && event.target.matches("#find, #with")) event.preventDefault();
    });
  }

  open() {
    const { ids, isSelection } = this.scope();
    this.ids = ids;
    const what = isSelection ? "selected images" : "images that are shown";
    by("replace-scope").textContent = `In the captions of ${ids.length.toLocaleString()} ${what}.`;
    this.dialog.showModal();
    by("find").focus();
    this.schedule();
  }

  schedule() {
    this.token = null;
    by("replace-go").disabled = true;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.guard(() => this.preview()), 150);
  }

  async preview() {
    const asked = ++this.asked;
    const find = by("find").value;
    by("replace-preview").replaceChildren();
    by("replace-count").textContent = "";
    if (!find || !this.ids.length) return;
    const answer = await post("preview", {
      ids: this.ids,
      find,
      replace: by("with").value,
      match_case: by("match-case").checked,
      whole_words: by("whole-words").checked,
    });
    if (asked !== this.asked) return;
    this.token = answer.preview;
    const more = answer.count > answer.changes.length ? `; the first ${answer.changes.length} are` : "; they are";
    by("replace-count").textContent = `${answer.count.toLocaleString()} captions would change${more} below.`;
    by("replace-preview").replaceChildren(
      ...answer.changes.map(({ name, before, after }) => {
        const line = document.createElement("li");
        line.append(element("div", name, "name"), difference(before, after));
        return line;
      }),
    );
    by("replace-go").disabled = !answer.count;
  }

  async replace() {
    by("replace-go").disabled = true; // many captions take a while
    by("replace-count").textContent = "Replacing…";
    let answer;
    try {
      answer = await post("replace", { preview: this.token });
    } catch (error) {
      if (!(error instanceof Refused)) throw error;
      by("replace-count").textContent = error.message; // the page is behind the dialog
      return;
    }
    this.dialog.close();
    this.onDone(describe("Replaced", answer), answer.kept_count > 0);
  }
}

export function describe(verb, { done, kept, kept_count: count }) {
  const line = `${verb}: ${done.toLocaleString()} captions`;
  if (!count) return line;
  const names = kept.slice(0, 3).map(({ name, problem }) => (problem ? `${name} (${problem})` : name));
  return `${line}; ${count.toLocaleString()} were changed elsewhere and stay: ${names.join(", ")}`;
}

export async function showHistory({ guard, onUndo }) {
  const { batches } = await get("history");
  by("history-list").replaceChildren(
    ...(batches.length ? [] : [element("li", "Nothing was changed yet.")]),
    ...batches.map((batch) => {
      const line = document.createElement("li");
      const more = batch.count > 1 ? ` and ${(batch.count - 1).toLocaleString()} more` : "";
      line.append(
        element("div", `${batch.time.replace("T", " ").slice(0, 16)} UTC, ${batch.action}: ${batch.name}${more}`, "name"),
        difference(batch.before, batch.after),
      );
      if (batch.can_undo) {
        const button = element("button", "Undo");
        button.type = "button";
        button.setAttribute("aria-label", `Undo ${batch.action} of ${batch.name}`);
        button.addEventListener("click", () => guard(async () => {
          by("history").close();
          await onUndo(batch.batch);
        }));
        line.append(button);
      }
      return line;
    }),
  );
  by("history").showModal();
}

export async function showFinish() {
  const answer = await post("finish");
  const left = answer.left_out ? ` ${answer.left_out} were left out: no dataset can hold their names.` : "";
  by("finish-text").textContent =
    `${answer.count.toLocaleString()} images and captions are in ${answer.folder}.${left} Train on them with:`;
  by("finish-commands").replaceChildren(
    ...answer.commands.map((command) => {
      const line = document.createElement("li");
      line.append(element("code", command));
      return line;
    }),
  );
  by("finish").showModal();
}

export function showHelp(keys) {
  const body = document.createElement("tbody");
  for (const [key, where, what] of keys) {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.append(element("kbd", key));
    row.append(head, element("td", what), element("td", where));
    body.append(row);
  }
  by("keys").querySelector("tbody")?.remove();
  by("keys").append(body);
  by("help").showModal();
}
