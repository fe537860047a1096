// The images API of this server: models, pictures as they are sampled, and its errors.

const KEY = "studio.key";

/** What the server refuses or fails at. status 0: it did not answer. retryAfter: seconds, where it says so. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, param, retryAfter });
  }
}

export const setKey = (key) => sessionStorage.setItem(KEY, key);

async function send(path, { signal, body } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (typeof body === "string") headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body === undefined ? "GET" : "POST", headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is it still running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let said = {};
  try {
    said = (await response.json()).error ?? {};
  } catch {
    // Not from our server: a proxy's page, say.
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After"));
  return new ApiError(said.message ?? `The server answered ${response.status} ${response.statusText}.`, {
    status: response.status,
    param: said.param,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

/** The models that the server offers, with their capabilities. */
export async function models() {
  return (await (await send("v1/models")).json()).data;
}

/** Whether more pictures are sampled than are kept: which ones is known at the end. */
export const chooses = (settings) => settings.num_candidates > settings.n;

/** Sample pictures; yields the server's events. source {picture, mask}: blobs, to complete that picture. */
export async function* sample(settings, source, signal) {
  const wanted = { response_format: "b64_json", output_format: "png", stream: true, ...settings };
  if (!chooses(settings)) wanted.partial_images = 3;
  let path = "v1/images/generations", body = JSON.stringify(wanted);
  if (source) {
    path = "v1/images/edits";
    body = new FormData();
    for (const [name, value] of Object.entries(wanted)) body.append(name, String(value));
    body.append("image", source.picture, "image.png");
    body.append("mask", source.mask, "mask.png");
  }
  const response = await send(path, { body, signal });
  for await (const event of serverEvents(response.body)) {
    if (event.error) throw new ApiError(event.error.message, { status: 500, param: event.error.param });
    yield event;
  }
}

/** The JSON of each server-sent event of a stream of bytes. */
async function* serverEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      pending += value.replaceAll("\r", "");
      const events = pending.split("\n\n");
      pending = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data && data !== "[DONE]") yield JSON.parse(data);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
