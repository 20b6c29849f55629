"use strict";
// Names and texts reach the page as text alone (textContent), addresses are made of ids and numbers.
const $ = (id) => document.getElementById(id);
const MAX_MEDIA = 2;
let media = []; // files of the question
let like = null; // {id, start_s, end_s, name}: an indexed moment that others shall be like
let running = null; // the request under way
let limitMib = 256;

function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const pad = (number, width) => String(number).padStart(width, "0");
  const rest = `${pad(Math.floor(tenths / 10) % 60, 2)}.${tenths % 10}`;
  const minutes = Math.floor(tenths / 600);
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${pad(minutes % 60, 2)}:${rest}`;
}

function say(text, wrong = false) {
  $("said").textContent = text;
  $("said").classList.toggle("wrong", wrong);
}

function part(label, picture, remove) {
  const box = document.createElement("div");
  box.className = "part";
  if (picture) box.append(picture);
  const name = document.createElement("span");
  name.textContent = label;
  name.title = label;
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "\u00d7";
  button.setAttribute("aria-label", "Remove " + label);
  button.addEventListener("click", remove);
  box.append(name, button);
  return box;
}

function showAsked() {
  for (const seen of $("asked").querySelectorAll("img, video")) URL.revokeObjectURL(seen.src);
  $("asked").replaceChildren();
  for (const file of media) {
    const picture = document.createElement(file.type.startsWith("video/") ? "video" : "img");
    picture.src = URL.createObjectURL(file);
    $("asked").append(part(file.name || "picture", picture, () => { media = media.filter((own) => own !== file); showAsked(); }));
  }
  if (like) {
    const picture = document.createElement("img");
    picture.src = `/poster/${like.id}?t=${like.start_s}`;
    picture.alt = "";
    const label = `like ${like.name}, ${clock(like.start_s)} to ${clock(like.end_s)}`;
    $("asked").append(part(label, picture, () => { like = null; showAsked(); }));
  }
}

function add(files) {
  for (const file of files) {
    if (file.size > limitMib * 2 ** 20) say(`${file.name} is larger than ${limitMib} MiB`, true);
    else if (media.length < MAX_MEDIA) media.push(file);
    else say(`A question holds at most ${MAX_MEDIA} pictures and clips`, true);
  }
  showAsked();
}

function release() { // players hold connections: a browser opens six to a server
  for (const video of $("hits").querySelectorAll("video")) {
    video.removeAttribute("src");
    video.load();
  }
}

function show(found) {
  release();
  $("hits").replaceChildren(...found.hits.map(card));
  $("hits").classList.remove("old");
  const count = found.hits.length;
  const seconds = (found.embed_s + found.search_s).toFixed(2);
  say(count ? `${count} ${count === 1 ? "moment" : "moments"} in ${seconds} s` : "Nothing was found.");
}

function card(hit) {
  const box = $("card").content.cloneNode(true).firstElementChild;
  const field = (name) => box.querySelector("." + name);
  const whole = hit.start_s === 0 && hit.end_s >= hit.duration_s;
  const video = box.querySelector("video");
  field("position").textContent = hit.position;
  field("span").textContent = `${clock(hit.start_s)} to ${clock(hit.end_s)}` + (whole ? "" : ` of ${clock(hit.duration_s)}`);
  field("score").textContent = hit.score.toFixed(3);
  field("name").textContent = hit.folder ? `${hit.folder}/${hit.name}` : hit.name;
  field("name").title = `${hit.name}\n${hit.width} x ${hit.height}, ${hit.codec}`;
  box.setAttribute("aria-label", `${hit.position}: ${hit.name}, ${clock(hit.start_s)} to ${clock(hit.end_s)}`);
  video.addEventListener("error", () => {
    if (!video.hasAttribute("src")) return; // released
    const address = `/media/${hit.id}`;
    const frame = document.createElement("img");
    frame.alt = `Frame at ${clock(hit.start_s)}`;
    frame.src = `/poster/${hit.id}?t=${hit.start_s.toFixed(3)}`;
    video.replaceWith(frame);
    field("note").hidden = false;
    field("note").textContent = `This browser cannot play the file (${hit.codec}): a frame of the moment is shown.`;
    fetch(address, { method: "HEAD" }).then((answer) => {
      if (answer.status === 404 || answer.status === 410) {
        frame.remove();
        field("note").textContent = "The file has changed or vanished since it was indexed.";
      }
    }).catch(() => {});
  });
  video.src = `/media/${hit.id}#t=${hit.start_s.toFixed(3)},${hit.end_s.toFixed(3)}`;
  field("like").addEventListener("click", () => more(hit));
  box.addEventListener("keydown", (event) => {
    if (event.target !== box) return;
    if (event.key === " ") {
      event.preventDefault();
      const own = box.querySelector("video");
      if (own) own.paused ? own.play() : own.pause();
    } else if (event.key === "m") more(hit);
    else move(event, box);
  });
  return box;
}

function more(hit) {
  like = hit;
  media = [];
  $("text").value = "";
  showAsked();
  search();
  window.scrollTo(0, 0);
}

function move(event, box) {
  const cards = [...$("hits").children];
  const columns = getComputedStyle($("hits")).gridTemplateColumns.split(" ").length;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
  const next = step && cards[cards.indexOf(box) + step];
  if (!step) return;
  event.preventDefault();
  (next || (step === -columns ? $("text") : box)).focus();
}

async function search() {
  const text = $("text").value.trim();
  if (!text && !media.length && !like) return say("Write something, or add a picture or a clip.", true);
  const form = new FormData();
  if (text) form.append("text", text);
  for (const file of media) form.append("media", file);
  if (like) {
    form.append("like", like.id);
    form.append("like_start_s", like.start_s);
    form.append("like_end_s", like.end_s);
  }
  for (const own of $("filters").querySelectorAll("[name]")) if (own.value) form.append(own.name, own.value);
  history.replaceState(null, "", text ? "?q=" + encodeURIComponent(text) : "/");
  running?.abort();
  const mine = (running = new AbortController());
  say("Searching\u2026");
  $("hits").classList.add("old");
  release(); // so that the question itself finds a connection free
  try {
    const answer = await fetch("/api/search", { method: "POST", body: form, signal: mine.signal });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error.message);
    show(found);
  } catch (error) {
    if (error.name === "AbortError") return;
    $("hits").replaceChildren();
    say(error instanceof TypeError ? "The server does not answer." : error.message, true);
  }
}

$("form").addEventListener("submit", (event) => { event.preventDefault(); search(); });
$("pick").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => { add($("file").files); $("file").value = ""; });
$("text").addEventListener("keydown", (event) => {
  if (event.key === "ArrowDown" && $("hits").firstElementChild) { event.preventDefault(); $("hits").firstElementChild.focus(); }
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing) { event.preventDefault(); $("text").focus(); $("text").select(); }
  if (event.key === "Escape") {
    media = []; like = null; $("text").value = "";
    showAsked();
    $("text").focus();
  }
});
document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) { event.preventDefault(); add(event.clipboardData.files); } });
let depth = 0;
document.addEventListener("dragenter", (event) => { event.preventDefault(); depth++; $("drop").hidden = false; });
document.addEventListener("dragleave", () => { if (--depth <= 0) { depth = 0; $("drop").hidden = true; } });
document.addEventListener("dragover", (event) => event.preventDefault());
document.addEventListener("drop", (event) => {
  event.preventDefault();
  depth = 0;
  $("drop").hidden = true;
  if (event.dataTransfer.files.length) { add(event.dataTransfer.files); search(); }
});
fetch("/api/index").then((answer) => answer.json()).then((facts) => {
  limitMib = facts.max_upload_mib;
  $("about").textContent = `${facts.windows} moments (${facts.cut}), model ${facts.model}`;
  if (!facts.windows) say("The index is empty.");
}).catch(() => {});
const first = new URLSearchParams(location.search).get("q");
if (first) { $("text").value = first; search(); }
