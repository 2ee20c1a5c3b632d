// Ask a server by clients from npm: `node ask.mjs CLIENT URL`. Says what is wrong, or nothing.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateText, stepCountIs, streamText, tool } from "ai";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const QUESTION = "Is it warm in Rome?";
const MODEL = "small";
const KEY = "sesame";
const MESSAGES = [{ role: "user", content: QUESTION }];
const Weather = z.object({ city: z.enum(["Rome", "北京"]), mood: z.enum(["warm", "cold"]) });
const PARAMETERS = {
  type: "object",
  properties: { city: { enum: ["Rome", "北京"] }, mood: { enum: ["warm", "cold"] } },
  required: ["city", "mood"],
  additionalProperties: false,
};
const FUNCTION = { name: "weather", description: "Tells it", parameters: PARAMETERS };

const CLIENTS = {
  async openai(url) {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 });
    const asked = { model: MODEL, messages: MESSAGES, max_tokens: 800 };
    const parsed = await client.chat.completions.parse({
      ...asked,
      response_format: zodResponseFormat(Weather, "weather"),
    });
    assert.ok(Weather.parse(parsed.choices[0].message.parsed));
    const stream = client.chat.completions.stream({
      ...asked,
      tools: [{ type: "function", function: FUNCTION }],
      tool_choice: "required",
      parallel_tool_calls: false,
    });
    let pieces = 0;
    stream.on("tool_calls.function.arguments.delta", () => pieces++);
    const { message } = (await stream.finalChatCompletion()).choices[0];
    assert.ok(pieces > 1);
    Weather.parse(JSON.parse(message.tool_calls[0].function.arguments));
    const told = await client.chat.completions.create({
      ...asked,
      messages: [
        ...MESSAGES,
        message,
        { role: "tool", tool_call_id: message.tool_calls[0].id, content: "21 degrees" },
      ],
      max_tokens: 4,
    });
    assert.equal(told.choices.length, 1);
    const responses = client.responses.stream({
      model: MODEL,
      input: QUESTION,
      text: { format: zodTextFormat(Weather, "weather") },
      max_output_tokens: 400,
    });
    assert.ok(Weather.parse((await responses.finalResponse()).output_parsed));
    const stopped = await client.chat.completions.create({ ...asked, stream: true });
    for await (const chunk of stopped) {
      assert.equal(chunk.object, "chat.completion.chunk");
      break; // it hangs up
    }
    await assert.rejects(
      client.chat.completions.create({ ...asked, temperature: -1 }),
      OpenAI.BadRequestError,
    );
  },

  // The default model of the provider speaks /v1/responses, as agents built on it do.
  ai_responses: (url) => sdk(createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY })(MODEL)),
  ai_chat: (url) => sdk(createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY }).chat(MODEL)),
  ai_compatible: (url) =>
    sdk(
      createOpenAICompatible({
        name: "moescope",
        baseURL: `${url}/v1`,
        apiKey: KEY,
        includeUsage: true,
        supportsStructuredOutputs: true,
      })(MODEL),
    ),
};

async function sdk(model) {
  const asked = { model, prompt: QUESTION, maxOutputTokens: 800, maxRetries: 0 };
  const plain = await generateText({ ...asked, maxOutputTokens: 4 });
  assert.ok(plain.usage.outputTokens <= 4);
  const formed = await generateText({ ...asked, output: Output.object({ schema: Weather }) });
  Weather.parse(formed.output);
  const streamed = streamText({ ...asked, output: Output.object({ schema: Weather }) });
  let pieces = 0;
  for await (const _ of streamed.textStream) pieces++;
  assert.ok(pieces > 1);
  Weather.parse(await streamed.output);
  const places = [];
  const tools = {
    weather: tool({
      description: "Tells it",
      inputSchema: Weather,
      execute: async (place) => {
        places.push(Weather.parse(place));
        return "21 degrees";
      },
    }),
  };
  const called = streamText({
    ...asked,
    tools,
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
    stopWhen: stepCountIs(2),
  });
  const kinds = new Set();
  for await (const part of called.fullStream) {
    if (part.type === "error") throw part.error;
    kinds.add(part.type);
  }
  assert.ok(kinds.has("tool-input-delta") && kinds.has("tool-result"), [...kinds].join());
  assert.ok(places.length > 0 && (await called.steps).length === 2);
}

await CLIENTS[process.argv[2]](process.argv[3]);
