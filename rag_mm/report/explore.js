"use strict";
// Document text is always set as text, never as markup; a URL becomes a link only if the server marks it as a
// web page.
const byId = (id) => document.getElementById(id);
const token = new URLSearchParams(location.search).get("token");
const maxDocs = Number(document.body.dataset.maxDocs);
let turn = 0; // Number of the latest query; responses to earlier queries are dropped.

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function imageElement(address, text) {
  if (!address) return make("p", "no image", "empty");
  const image = make("img");
  image.src = address;
  image.alt = text;
  return image;
}

function say(text, isWrong = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("wrong", isWrong);
}

// `query` is {text}, {document} or {file}; a file is sent as the body, the other fields in the URL.
async function post(path, query, fields) {
  const { file, ...rest } = query;
  const all = { ...rest, ...fields };
  const address = file ? `${path}?${new URLSearchParams(all)}` : path;
  const response = await fetch(address, {
    method: "POST",
    headers: {
      "Authorization": `Bearer ${token}`,
      "Content-Type": file ? "application/octet-stream" : "application/json",
    },
    body: file || JSON.stringify(all),
  });
  const answer = await response.json().catch(() => ({ error: "The server did not respond." }));
  if (!response.ok) throw new Error(answer.error || "The request failed.");
  return answer;
}

function showHit(hit) {
  const item = make("li");
  item.append(imageElement(hit.image, hit.text), make("p", hit.text || "(no text)"));
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
  origin.append(` · ${hit.license || "no licence"}`);
  const like = make("button", "find similar");
  like.type = "button";
  like.addEventListener("click", () => ask({ document: hit.id }, `similar to ${hit.id}`));
  item.append(origin, like);
  return item;
}

function documentsTitle(docs) {
  return docs === 1 ? "1 document" : `${docs || "no"} documents`;
}

function showAnswer(title, answer) {
  const place = make("article");
  place.append(make("h3", title));
  if (answer.image) place.append(imageElement(answer.image, title));
  for (const image of answer.images || []) place.append(imageElement(image, title));
  if (answer.candidates) place.append(candidateList(answer.candidates));
  if (answer.text !== undefined) place.append(make("p", answer.text || "(empty)", "said"));
  for (const neighbor of answer.neighbors) {
    const score = neighbor.score === null ? "given" : neighbor.score.toFixed(3);
    place.append(make("p", `document ${neighbor.id} (${score}): ${neighbor.text}`, "soft"));
  }
  byId("answers").append(place);
}

// All candidates with their scores, of which the image above is the best.
function candidateList(candidates) {
  const list = make("ol", undefined, "candidates");
  for (const { image, score } of candidates) {
    const item = make("li");
    item.append(imageElement(image, `candidate, score ${score.toFixed(3)}`));
    item.append(make("p", score.toFixed(3), "soft"));
    list.append(item);
  }
  return list;
}

// The named fields inside an element; what is left empty is not sent.
function namedFields(selector) {
  const fields = { seed: Number(byId("seed").value) };
  for (const input of document.querySelectorAll(`${selector} [name]:not(button)`)) {
    if (input.value === "") continue;
    fields[input.name] = input.type === "number" ? Number(input.value) : input.value;
  }
  return fields;
}

// One answer for each number of documents; a given structure takes the place of one.
async function showAnswers(path, query, fields, most, mine) {
  for (let docs = 0; docs <= most; docs++) {
    say(`${path} with ${docs} of ${most} documents …`);
    const answer = await post(path, query, { docs, ...fields });
    if (mine !== turn) return;
    showAnswer(documentsTitle(docs), answer);
  }
}

async function generateOrCaption(query, mine) {
  if (query.file) return showAnswers("caption", query, {}, maxDocs, mine);
  const [structure] = byId("structure")?.files || [];
  const most = structure ? maxDocs - 1 : maxDocs;
  const whole = structure ? { ...query, file: structure } : query;
  return showAnswers("generate", whole, namedFields("#options"), most, mine);
}

async function ask(query, name) {
  const mine = ++turn;
  const fields = { k: Number(byId("k").value) };
  if (byId("view").value) fields.view = byId("view").value;
  byId("answers").replaceChildren();
  byId("hits").replaceChildren();
  byId("asked").textContent = "";
  say("searching …");
  try {
    const result = await post("search", query, fields);
    if (mine !== turn) return;
    byId("hits").replaceChildren(...result.hits.map(showHit));
    byId("asked").textContent = `${name} · view ${result.view}`;
    if (query.document === undefined) await generateOrCaption(query, mine);
    if (mine === turn) say("");
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

// A second picture follows the first in the body.
async function showEdit(picture, second, text, mine) {
  say("edit …");
  const fields = namedFields("#instruct");
  if (second) fields.first = picture.size;
  const file = second ? new Blob([picture, second]) : picture;
  const answer = await post("edit", { file, text }, fields);
  if (mine === turn) showAnswer(text, answer);
}

// Edits the chosen picture, or answers a question about it.
async function instruct(path) {
  const mine = ++turn;
  const text = byId("instruction").value;
  const [picture] = byId("picture").files;
  byId("answers").replaceChildren();
  try {
    if (!picture) throw new Error("Choose a picture.");
    if (path === "ask") await showAnswers(path, { file: picture, text }, {}, maxDocs, mine);
    else await showEdit(picture, byId("second").files[0], text, mine);
    if (mine === turn) say("");
  } catch (error) {
    if (mine === turn) say(error.message, true);
  }
}

function askImage(files) {
  if (files.length) ask({ file: files[0] }, files[0].name);
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask({ text: byId("text").value }, byId("text").value);
});
byId("file").addEventListener("change", (event) => {
  askImage(event.target.files);
});
byId("instruct")?.addEventListener("submit", (event) => {
  event.preventDefault();
  instruct(event.submitter.value);
});
// On the whole page: an image dropped outside the field must not replace the page.
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", name === "dragover");
    if (name === "drop") askImage(event.dataTransfer.files);
  });
}
