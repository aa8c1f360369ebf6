// The page: asks /v1/chat/completions, and shows what was kept. No library, nothing from elsewhere.

const $ = (id) => document.getElementById(id);
const pictures = []; // data addresses of the next question
let history = []; // messages of the chat so far
let running = null; // what stops the answers that are under way
let model = "";
let isVllm = false; // it tells what was kept only when it is asked

function say(text, isWrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("wrong", isWrong);
}

function headers() {
  const key = $("key").value.trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// Pictures

function readFile(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read`));
    reader.readAsDataURL(file);
  });
}

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      say(`${file.name} is no picture`, true);
      continue;
    }
    pictures.push(await readFile(file));
  }
  showChosen();
}

function showChosen() {
  $("chosen").replaceChildren(
    ...pictures.map((address, index) => {
      const image = Object.assign(new Image(), { src: address, alt: `Picture ${index + 1}` });
      const remove = Object.assign(document.createElement("button"), { type: "button", textContent: "remove" });
      remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
      remove.addEventListener("click", () => {
        pictures.splice(index, 1);
        showChosen();
        $("file").focus();
      });
      const item = document.createElement("li");
      item.append(image, remove);
      return item;
    }),
  );
}

// Asking

function message() {
  const images = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role: "user", content: [...images, { type: "text", text: $("question").value }] };
}

function rates(isDense) {
  if (isDense) return { dense: true, explain: true };
  return {
    image_keep_rate: $("image-rate").valueAsNumber / 100,
    text_keep_rate: $("text-rate").valueAsNumber / 100,
    explain: true,
  };
}

async function* events(response) {
  const decoder = new TextDecoder();
  let rest = "";
  for (let reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    rest += decoder.decode(value, { stream: true });
    const lines = rest.split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function ask(messages, isDense, card, signal) {
  const started = performance.now();
  const body = {
    model, messages, stream: true, stream_options: { include_usage: true }, sparsity: rates(isDense),
    ...(isVllm && { logprobs: true }), // for the text of each token
  };
  const response = await fetch("/v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Error(said.error?.message ?? `the server answered with ${response.status}`);
  }
  const text = card.querySelector(".text");
  const tokens = [];
  let answer = "", first = 0, pieces = 0, id = "", usage = null;
  for await (const piece of events(response)) {
    if (piece.error) throw new Error(piece.error.message);
    id = piece.id ?? id;
    usage = piece.usage ?? usage;
    const added = piece.choices?.[0]?.delta?.content;
    tokens.push(...shared(added ?? "", piece.choices?.[0]?.logprobs?.content ?? []));
    if (added) {
      first ||= performance.now();
      pieces += 1;
      answer += added;
      text.textContent = answer.trimStart();
      showSpeed(card, first - started, (1000 * (pieces - 1)) / (performance.now() - first));
    }
    if (piece.sparsity) show(card, piece.sparsity);
  }
  if (isVllm) await explain(card, id, messages, tokens, signal);
  if (usage && !card.classList.contains("explained")) showUsage(card, usage);
  return answer;
}

// Beside vLLM, whose streams do not tell what was kept

const views = new Map(); // pictures as the tower sees them, by their data addresses

// The text of a piece, shared out among its tokens; the last one gets what is left.
function shared(text, tokens) {
  let start = 0;
  return tokens.map(({ token }, number) => {
    const end = number === tokens.length - 1 ? text.length : Math.min(text.length, start + token.length);
    const part = text.slice(start, end);
    start = end;
    return part;
  });
}

async function explain(card, id, messages, tokens, signal) {
  try {
    const response = await fetch(`/sparsity/${encodeURIComponent(id)}`, { headers: headers(), signal });
    if (!response.ok) return;
    const sparsity = await response.json();
    const urls = messages.flatMap(({ content }) => (Array.isArray(content) ? content : []))
      .filter(({ type }) => type === "image_url").map((part) => part.image_url.url);
    for (const [number, picture] of sparsity.pictures.entries()) picture.seen = await seen(urls[number], signal);
    // The last token was never fed back, so no flag is known of it.
    if (tokens.length) sparsity.words = tokens.map((text, number) => ({ text, kept: sparsity.output_kept[number] ?? true }));
    show(card, sparsity);
  } catch (error) {
    console.warn(error); // the answer is there, and counts
  }
}

async function seen(url, signal) {
  if (!views.has(url)) {
    const response = await fetch("/seen", { method: "POST", headers: headers(), body: JSON.stringify({ url }), signal });
    views.set(url, response.ok ? (await response.json()).seen : null);
  }
  return views.get(url);
}

// Showing

function newCard(title) {
  const card = $("answer").content.firstElementChild.cloneNode(true);
  card.querySelector("h2").textContent = title;
  return card;
}

function showSpeed(card, wait, rate) {
  const speed = Number.isFinite(rate) && rate > 0 ? `, ${rate.toFixed(1)} pieces/s` : "";
  card.querySelector(".speed").textContent = `first word after ${(wait / 1000).toFixed(2)} s${speed}`;
}

function row(name, kept, all) {
  const line = document.createElement("tr");
  const head = Object.assign(document.createElement("th"), { scope: "row", textContent: name });
  const cells = [kept, all].map((value) => Object.assign(document.createElement("td"), { textContent: value }));
  line.append(head, ...cells);
  return line;
}

function show(card, sparsity) {
  card.classList.add("explained");
  const kilo = (bytes) => `${Math.round(bytes / 1000).toLocaleString("en")} kB`;
  const mega = (flops) => `${(flops / 1e6).toFixed(0)} M`;
  card.querySelector("table").hidden = false;
  card.querySelector("tbody").replaceChildren(
    row("Image tokens", sparsity.image_tokens_kept, sparsity.image_tokens),
    row("Output tokens", sparsity.output_tokens_kept, sparsity.output_tokens),
    row("K/V cache", kilo(sparsity.kv_bytes), kilo(sparsity.kv_bytes_dense)),
  );
  if (sparsity.prefill_flops) {
    card.querySelector("tbody").append(
      row("Work of the prompt (FLOPs)", mega(sparsity.prefill_flops), mega(sparsity.prefill_flops_dense)),
    );
    card.querySelector(".speed").textContent =
      `first token after ${sparsity.seconds_to_first_token.toFixed(2)} s, ${sparsity.tokens_per_second.toFixed(1)} tokens/s`;
  }
  if (sparsity.words) showWords(card, sparsity.words);
  if (sparsity.pictures) card.querySelector(".pictures").replaceChildren(...sparsity.pictures.map(drawn));
}

function showWords(card, words) {
  const first = words.findIndex(({ text }) => text.trim());
  const spans = words.map(({ text: word, kept }, index) => {
    const text = index > first ? word : word.trimStart();
    if (kept) return document.createTextNode(text);
    return Object.assign(document.createElement("span"), { className: "forgotten", textContent: text });
  });
  card.querySelector(".text").replaceChildren(...spans);
  card.querySelector(".legend").hidden = words.every(({ kept }) => kept);
}

function drawn(picture, index) {
  const figure = document.createElement("figure");
  const caption = `Picture ${index + 1}: ${picture.kept.length} of ${picture.tokens} patches kept`;
  figure.append(Object.assign(document.createElement("figcaption"), { textContent: caption }));
  if (picture.seen === null || picture.side === null) return figure;
  const canvas = Object.assign(document.createElement("canvas"), { width: 384, height: 384 });
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", caption);
  figure.prepend(canvas);
  const image = new Image();
  image.onload = () => {
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    context.fillStyle = "rgb(12 12 12 / 78%)";
    const kept = new Set(picture.kept);
    const edge = (place) => Math.round((place * canvas.width) / picture.side);
    for (let patch = 0; patch < picture.tokens; patch += 1) {
      if (kept.has(patch)) continue;
      const [y, x] = [Math.floor(patch / picture.side), patch % picture.side];
      context.fillRect(edge(x), edge(y), edge(x + 1) - edge(x), edge(y + 1) - edge(y));
    }
    canvas.dataset.drawn = picture.kept.length;
  };
  image.src = picture.seen;
  return figure;
}

function showUsage(card, usage) {
  card.querySelector(".legend").hidden = false;
  card.querySelector(".legend").textContent =
    `${usage.prompt_tokens} tokens asked, ${usage.completion_tokens} answered; the engine does not tell what was kept.`;
}

// The form

async function submit(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  const asked = message();
  const messages = [...history, asked];
  const turn = Object.assign(document.createElement("div"), { className: "turn" });
  const question = Object.assign(document.createElement("p"), { className: "question", textContent: $("question").value });
  const isDense = $("dense").checked;
  const cards = [[newCard(isDense ? "Dense" : "Sparse"), isDense]];
  if ($("both").checked && !isDense) cards.push([newCard("Dense"), true]);
  const side = Object.assign(document.createElement("div"), { className: "cards" });
  side.append(...cards.map(([card]) => card));
  turn.append(question, side);
  $("log").prepend(turn);
  $("send").disabled = true;
  $("stop").disabled = false;
  say("Answering …");
  try {
    let answer = null;
    for (const [card, dense] of cards) {
      const text = await ask(messages, dense, card, running.signal);
      answer ??= text;
    }
    history = [...messages, { role: "assistant", content: answer }];
    pictures.length = 0;
    showChosen();
    $("question").value = "";
    say("Done.");
  } catch (error) {
    say(error.name === "AbortError" ? "Stopped." : error.message, error.name !== "AbortError");
  } finally {
    running = null;
    $("send").disabled = false;
    $("stop").disabled = true;
    $("question").focus();
  }
}

function startAnew() {
  running?.abort();
  history = [];
  pictures.length = 0;
  views.clear();
  showChosen();
  $("log").replaceChildren();
  $("question").value = "Describe the picture.";
  say("");
}

for (const name of ["image-rate", "text-rate"]) {
  $(name).addEventListener("input", () => {
    $(`${name}-said`).textContent = `${$(name).value} %`;
  });
}
$("dense").addEventListener("change", () => {
  for (const name of ["image-rate", "text-rate", "both"]) $(name).disabled = $("dense").checked;
});
$("file").addEventListener("change", async () => {
  await addFiles($("file").files);
  $("file").value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
});
$("form").addEventListener("submit", submit);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", startAnew);
$("key").addEventListener("change", greet);

async function greet() {
  try {
    const listed = await fetch("/v1/models", { headers: headers() });
    if (!listed.ok) throw new Error("the server wants its key: see below the form");
    model = (await listed.json()).data[0].id;
    const health = await fetch("/health").then((answer) => answer.json()).catch(() => ({}));
    isVllm = !health.engine;
    $("engine").textContent = `Model ${model}, ${health.engine ?? "served by vLLM"}.`;
    say("");
  } catch (error) {
    say(error.message, true);
  }
}
greet();
