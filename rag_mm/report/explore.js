"use strict";
// What documents say is set as text and never as markup; an address becomes a link only where the server
// says that it leads to a page.
const byId = (id) => document.getElementById(id);
const maxDocs = Number(document.body.dataset.maxDocs);
let turn = 0; // Answers to an earlier question than the last are dropped.

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function picture(address, text) {
  if (!address) return make("p", "no picture", "empty");
  const image = make("img");
  image.src = address;
  image.alt = text;
  return image;
}

function say(text, isWrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", isWrong);
}

// `asked` is {text}, {document} or {file}; a picture travels as it is, and its fields in the address.
async function post(path, asked, fields) {
  const { file, ...words } = asked;
  const all = { ...words, ...fields };
  const address = file ? `${path}?${new URLSearchParams(all)}` : path;
  const response = await fetch(address, {
    method: "POST",
    headers: { "Content-Type": file ? "application/octet-stream" : "application/json" },
    body: file || JSON.stringify(all),
  });
  const answer = await response.json().catch(() => ({ error: "The server gave no answer." }));
  if (!response.ok) throw new Error(answer.error || "The server could not answer.");
  return answer;
}

function showHit(hit) {
  const item = make("li");
  item.append(picture(hit.image, hit.text), make("p", hit.text || "(no text)"));
  item.append(make("p", `${hit.score.toFixed(3)} · ${hit.id}`, "soft"));
  const origin = make("p", undefined, "soft");
  if (hit.link) {
    const link = make("a", hit.url);
    link.href = hit.link;
    link.rel = "noreferrer noopener";
    origin.append(link);
  } else {
    origin.append(hit.url || "no url");
  }
  origin.append(` · ${hit.license || "no licence given"}`);
  const like = make("button", "more like this");
  like.type = "button";
  like.addEventListener("click", () => ask({ document: hit.id }, `like ${hit.id}`));
  item.append(origin, like);
  return item;
}

function showAnswer(place, docs, answer) {
  const title = docs === 1 ? "1 document" : `${docs || "no"} documents`;
  place.replaceChildren(make("h3", title));
  if (answer.image) place.append(picture(answer.image, title));
  if (answer.text !== undefined) place.append(make("p", answer.text || "(nothing)", "said"));
  for (const found of answer.neighbors) {
    const score = found.score === null ? "by hand" : found.score.toFixed(3);
    place.append(make("p", `read ${found.id} (${score}): ${found.text}`, "soft"));
  }
}

async function showAnswers(asked, mine) {
  const path = asked.file ? "caption" : "generate";
  for (let docs = 0; docs <= maxDocs; docs++) {
    say(`${asked.file ? "describing" : "drawing"} with ${docs} of ${maxDocs} documents …`);
    const answer = await post(path, asked, { docs, seed: Number(byId("seed").value) });
    if (mine !== turn) return;
    const place = make("article");
    showAnswer(place, docs, answer);
    byId("answers").append(place);
  }
}

async function ask(asked, name) {
  const mine = ++turn;
  const fields = { k: Number(byId("k").value) };
  if (byId("view").value) fields.view = byId("view").value;
  byId("answers").replaceChildren();
  byId("hits").replaceChildren();
  byId("asked").textContent = "";
  say("searching …");
  try {
    const found = await post("search", asked, fields);
    if (mine !== turn) return;
    byId("hits").replaceChildren(...found.hits.map(showHit));
    byId("asked").textContent = `${name} · view ${found.view}`;
    if (asked.document === undefined) await showAnswers(asked, mine);
    if (mine === turn) say("");
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

function askPicture(files) {
  if (files.length) ask({ file: files[0] }, files[0].name);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask({ text: byId("text").value }, byId("text").value);
});
byId("file").addEventListener("change", (event) => {
  askPicture(event.target.files);
});
// Anywhere on the page: a picture that misses the field must not replace the page.
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") askPicture(event.dataTransfer.files);
  });
}
