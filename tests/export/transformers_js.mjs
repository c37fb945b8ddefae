// What transformers.js makes of an exported folder: reads a request as JSON from stdin, prints the answer as JSON.
//
//     node transformers_js.mjs FOLDER_WITH_NODE_MODULES < request.json
//
// {"folder": ..., "dtype": ..., "task": ..., "pictures": [...]}: without a dtype pixel values, with one the scores of
// all classes, or the features, as they are and pooled.

import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const require = createRequire(path.join(process.argv[2], "here.js"));
const { AutoImageProcessor, RawImage, env, pipeline } = require("@huggingface/transformers");
const { folder, dtype, task, pictures } = JSON.parse(readFileSync(0, "utf-8"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const answer = {};
const plain = ({ dims, data }) => ({ dims, data: Array.from(data) });
if (task === "image-feature-extraction") {
  const encode = await pipeline(task, name, { dtype });
  answer.features = plain(await encode(pictures));
  answer.pooled = plain(await encode(pictures, { pool: true }));
} else if (dtype) {
  const classify = await pipeline("image-classification", name, { dtype });
  answer.together = await classify(pictures, { top_k: null });
  answer.alone = [];
  for (const picture of pictures) answer.alone.push(await classify(picture, { top_k: null }));
} else {
  const processor = await AutoImageProcessor.from_pretrained(name);
  answer.pixel_values = [];
  for (const picture of pictures) {
    const { pixel_values } = await processor(await RawImage.read(picture));
    answer.pixel_values.push(plain(pixel_values));
  }
}
console.log(JSON.stringify(answer));
