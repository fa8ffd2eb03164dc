// The npm `openai` package, unchanged, against the bundled models: `node --input-type=module - URL < npm_openai.mjs`
// where node_modules holds the package. Prints one line of JSON; exit status 1 where a check failed.
// python_openai.py does the same checks under the same names.

import assert from "node:assert/strict";
import OpenAI, { BadRequestError, NotFoundError } from "openai";
import { VERSION } from "openai/version";

const ABORT_SECONDS = 10;
const LONG = 1500; // tokens: seconds of work, of which an abort leaves most undone

const url = process.argv[2];
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const model = "tandem-demo";
const greedy = { model, temperature: 0, seed: 7 };
const user = (content) => [{ role: "user", content }];

const product = user("What is 417 * 23?");
const calculator = {
  type: "function",
  function: {
    name: "calculator",
    description: "Evaluates an arithmetic expression.",
    parameters: { type: "object", properties: { expression: { type: "string" } }, required: ["expression"] },
  },
};
const verdict = {
  type: "object",
  properties: { verdict: { enum: ["good", "bad"] }, score: { type: "integer", minimum: 0, maximum: 10 } },
  required: ["verdict", "score"],
  additionalProperties: false,
};

async function all(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

/** How many choices have ended because their client left. */
async function aborted() {
  const text = await (await fetch(`${url}/metrics`)).text();
  const lines = text.match(/^tandem:request_success_total\{.*finished_reason="abort".*\} .*$/gm) ?? [];
  return lines.reduce((sum, line) => sum + Number(line.split(" ").at(-1)), 0);
}

const checks = {
  async models() {
    const ids = [];
    for await (const one of client.models.list()) ids.push(one.id);
    assert.deepEqual(ids.sort(), ["tandem-demo", "tandem-demo-reward"]);
    assert.equal((await client.models.retrieve(model)).owned_by, "tandem");
  },

  async chat() {
    const answer = await client.chat.completions.create({ ...greedy, messages: user("What is the capital of France?") });
    assert.match(answer.choices[0].message.content, /Paris/);
    assert.equal(answer.choices[0].finish_reason, "stop");
    const { prompt_tokens, completion_tokens, total_tokens } = answer.usage;
    assert.ok(completion_tokens > 0 && prompt_tokens + completion_tokens === total_tokens);
  },

  async chat_stream() {
    const asked = { ...greedy, messages: user("法国的首都是哪里?") };
    // Long enough to come in pieces however busy this machine is: tokens that wait for their reader come as one.
    const long = { ...asked, max_tokens: 200, ignore_eos: true };
    const whole = await client.chat.completions.create(long);
    const options = { stream: true, stream_options: { include_usage: true } };
    const chunks = await all(await client.chat.completions.create({ ...long, ...options }));
    const deltas = chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.delta.content ?? "");
    assert.equal(deltas.join(""), whole.choices[0].message.content);
    assert.ok(deltas.filter(Boolean).length > 1, "it came in one piece");
    assert.deepEqual(chunks.at(-1).usage.completion_tokens, whole.usage.completion_tokens);
    const plain = await client.chat.completions.create(asked);
    assert.equal(await client.chat.completions.stream(asked).finalContent(), plain.choices[0].message.content);
  },

  async tool_call() {
    const asked = { ...greedy, tools: [calculator] };
    const { finish_reason, message } = (await client.chat.completions.create({ ...asked, messages: product })).choices[0];
    assert.equal(finish_reason, "tool_calls");
    const [call] = message.tool_calls;
    assert.equal(call.function.name, "calculator");
    assert.deepEqual(JSON.parse(call.function.arguments), { expression: "417 * 23" });
    const result = { role: "tool", tool_call_id: call.id, content: "9591" };
    const answer = await client.chat.completions.create({ ...asked, messages: [...product, message, result] });
    assert.match(answer.choices[0].message.content, /9591/);
  },

  async tool_call_stream() {
    const asked = { ...greedy, tools: [calculator], messages: product };
    const chunks = await all(await client.chat.completions.create({ ...asked, stream: true }));
    const calls = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
    assert.ok(calls.length > 2 && calls.every((call) => call.index === 0) && calls[0].id);
    assert.equal(calls[0].function.name, "calculator");
    const written = calls.map((call) => call.function.arguments ?? "").join("");
    assert.deepEqual(JSON.parse(written), { expression: "417 * 23" });
    assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");
    const whole = await client.chat.completions.stream(asked).finalChatCompletion();
    assert.equal(whole.choices[0].message.tool_calls[0].function.arguments, written);
  },

  async json_schema() {
    const response_format = { type: "json_schema", json_schema: { name: "verdict", strict: true, schema: verdict } };
    const asked = { ...greedy, messages: user("Is Paris the capital of France?"), response_format };
    const { finish_reason, message } = (await client.chat.completions.parse(asked)).choices[0];
    assert.equal(finish_reason, "stop");
    assert.deepEqual(Object.keys(message.parsed).sort(), ["score", "verdict"]);
    assert.ok(["good", "bad"].includes(message.parsed.verdict));
    assert.ok(Number.isInteger(message.parsed.score) && message.parsed.score >= 0 && message.parsed.score <= 10);
  },

  async completions_logprobs() {
    const asked = { ...greedy, prompt: "The capital of France is", max_tokens: 3, logprobs: 2 };
    const { finish_reason, text, logprobs } = (await client.completions.create(asked)).choices[0];
    assert.equal(finish_reason, "length"); // an end token would be in the tokens and not in the text
    assert.equal(logprobs.tokens.join(""), text);
    logprobs.tokens.forEach((token, i) => {
      const top = logprobs.top_logprobs[i];
      assert.equal(top[token], logprobs.token_logprobs[i]);
      assert.ok(top[token] === Math.max(...Object.values(top)) && top[token] <= 0, "greedy takes the likeliest");
    });
    const chunks = await all(await client.completions.create({ ...asked, stream: true }));
    assert.equal(chunks.map((chunk) => chunk.choices[0]?.text ?? "").join(""), text);
  },

  async embeddings() {
    await assert.rejects(client.embeddings.create({ model, input: "Paris" }), (error) => {
      assert.ok(error instanceof BadRequestError, `${error}`);
      assert.match(error.message, /embedding/);
      return true;
    });
  },

  async errors() {
    const refused = async (kind, fields, promise) => {
      const error = await promise.then(() => assert.fail("it was not refused"), (reason) => reason);
      assert.ok(error instanceof kind, `${error}`);
      for (const [name, value] of Object.entries(fields)) assert.equal(error[name], value);
    };
    const create = (more) => client.chat.completions.create({ model, messages: product, ...more });
    await refused(BadRequestError, { status: 400, param: "temperature" }, create({ temperature: 3 }));
    await refused(BadRequestError, { status: 400, param: "n" }, create({ n: 0, stream: true }));
    await refused(NotFoundError, { param: "model", code: "model_not_found" }, create({ model: "gpt-5" }));
    await refused(NotFoundError, { status: 404 }, client.models.retrieve("nobody/nothing"));
    await refused(NotFoundError, { status: 404 }, client.responses.create({ model, input: "hi" }));
  },

  async abort() {
    const before = await aborted();
    const asked = { ...greedy, messages: product, max_tokens: LONG, ignore_eos: true, stream: true };
    const stream = await client.chat.completions.create(asked);
    let seen = 0;
    for await (const _ of stream) if (++seen === 3) stream.controller.abort();
    assert.equal(seen, 3);
    const end = Date.now() + 1000 * ABORT_SECONDS;
    while ((await aborted()) === before) {
      assert.ok(Date.now() < end, `the server went on for ${ABORT_SECONDS} s`);
      await new Promise((resolve) => setTimeout(resolve, 50));
    }
  },
};

const passed = [];
const failed = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    passed.push(name);
  } catch (error) {
    failed[name] = `${error.name}: ${error.message}`;
  }
}
console.log(JSON.stringify({ client: "npm openai", version: VERSION, node: process.version, passed, failed }));
process.exitCode = Object.keys(failed).length ? 1 : 0;
