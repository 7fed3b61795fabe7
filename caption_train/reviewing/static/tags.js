// Tags of a caption as chips, with a field that completes them from those of the folder.

import { get } from "./api.js";

export function splitTags(text) {
  return text.split(",").map((part) => part.trim().replace(/\s+/g, " ")).filter(Boolean);
}

export class Tags {
  constructor({ chips, field, list, read, write }) {
    Object.assign(this, { chips, field, list, read, write, chosen: -1, asked: 0 });
    field.addEventListener("input", () => this.complete());
    field.addEventListener("focus", () => this.complete());
    field.addEventListener("blur", () => setTimeout(() => this.close(), 150));
    field.addEventListener("keydown", (event) => this.press(event));
  }

  show() {
    const tags = splitTags(this.read());
    this.chips.replaceChildren(
      ...tags.map((tag, place) => {
        const chip = document.createElement("li");
        const name = document.createElement("span");
        name.textContent = tag;
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "×";
        remove.setAttribute("aria-label", `remove ${tag}`);
        remove.addEventListener("click", () => this.write(tags.filter((_, other) => other !== place).join(", ")));
        chip.append(name, remove);
        return chip;
      }),
    );
  }

  add(tag) {
    const tags = splitTags(this.read());
    const news = splitTags(tag).filter((one) => !tags.includes(one));
    if (news.length) this.write([...tags, ...news].join(", "));
    this.field.value = "";
    this.close();
  }

  async complete() {
    const asked = ++this.asked;
    const { tags } = await get("tags", { prefix: this.field.value }).catch(() => ({ tags: [] }));
    if (asked !== this.asked || document.activeElement !== this.field) return;
    this.chosen = -1;
    const has = splitTags(this.read());
    this.list.replaceChildren(...tags.filter(([tag]) => !has.includes(tag)).slice(0, 8).map(([tag, count], place) => {
      const option = document.createElement("li");
      option.setAttribute("role", "option");
      option.id = `tag-${place}`;
      option.dataset.tag = tag;
      option.setAttribute("aria-selected", "false");
      const name = document.createElement("span");
      name.textContent = tag;
      const number = document.createElement("span");
      number.textContent = count;
      option.append(name, number);
      option.addEventListener("mousedown", (event) => event.preventDefault());
      option.addEventListener("click", () => this.add(tag));
      return option;
    }));
    this.list.hidden = !this.list.children.length;
    this.field.setAttribute("aria-expanded", String(!this.list.hidden));
  }

  close() {
    this.asked++;
    this.list.hidden = true;
    this.chosen = -1;
    this.field.setAttribute("aria-expanded", "false");
    this.field.removeAttribute("aria-activedescendant");
  }

  press(event) {
    const options = [...this.list.children];
    if (event.key === "Enter") {
      event.preventDefault();
      this.add(this.chosen >= 0 ? options[this.chosen].dataset.tag : this.field.value);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!options.length) return;
      const step = event.key === "ArrowDown" ? 1 : -1;
      this.chosen = (this.chosen + step + options.length) % options.length;
      options.forEach((option, place) => option.setAttribute("aria-selected", String(place === this.chosen)));
      this.field.setAttribute("aria-activedescendant", options[this.chosen].id);
    }
  }
}
