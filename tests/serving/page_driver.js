// Runs the script of the page under Node, on elements that stand for a browser's, and does what a user would.
// stdin: {script, elements: [{id, tag, value, disabled}], url, steps}; stdout: what each "show" step saw.
"use strict";

class Element extends EventTarget {
  constructor(tag) {
    super();
    Object.assign(this, { tag, children: [], className: "", attributes: {}, scrollHeight: 0, scrollTop: 0, clientHeight: 0 });
  }
  append(...children) { this.children.push(...children); }
  replaceChildren() { this.children = []; }
  setAttribute(name, value) { this.attributes[name] = value; }
  focus() {}
  requestSubmit() { this.dispatchEvent(new Event("submit", { cancelable: true })); }
  get textContent() { return this.children.map((child) => child.textContent ?? String(child)).join(""); }
  set textContent(text) { this.children = text === "" ? [] : [String(text)]; }
}

// The texts of elements that hold text themselves, each with its tag and classes.
function texts(element) {
  if (element.hidden) return [];
  const own = element.children.filter((child) => !(child instanceof Element)).join("");
  const inner = element.children.filter((child) => child instanceof Element).flatMap(texts);
  return own ? [[element.tag, element.className, own], ...inner] : inner;
}

async function main() {
  let input = "";
  for await (const part of process.stdin.setEncoding("utf8")) input += part;
  const { script, elements, url, steps } = JSON.parse(input);
  const found = new Map(elements.map(({ id, tag, ...rest }) => [id, Object.assign(new Element(tag), rest)]));
  const document = new Element("document");
  document.getElementById = (id) => found.get(id) ?? null;
  document.createElement = (tag) => new Element(tag);
  const ask = globalThis.fetch;
  const fetch = (path, options) => ask(url + path, options);
  new Function("document", "fetch", script)(document, fetch);

  const until = async (holds) => { while (!holds()) await new Promise((resolve) => setTimeout(resolve, 5)); };
  const seen = [];
  for (const [step, ...given] of steps) {
    const element = found.get(given[0]);
    if (step === "set") element.value = given[1];
    if (step === "click") element.dispatchEvent(new Event("click"));
    if (step === "change") element.dispatchEvent(new Event("change"));
    if (step === "submit") found.get("form").requestSubmit();
    if (step === "key") document.dispatchEvent(Object.assign(new Event("keydown"), given[0]));
    if (step === "until idle") await until(() => !found.get("send").disabled);
    if (step === "until shown") await until(() => element.textContent.includes(given[1]));
    if (step === "show") {
      const values = [...found].map(([id, { value, disabled, textContent }]) => [id, { value, disabled, text: textContent }]);
      seen.push({ lines: texts(found.get("log")), ...Object.fromEntries(values) });
    }
  }
  process.stdout.write(JSON.stringify(seen), () => process.exit(0));
}

main();
