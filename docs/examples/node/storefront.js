// Ask for one page and print its ids as JSON:  node storefront.js HOST:PORT [USER [ITEM ...]]
//
// ITEM ... is what the visitor looked at just now, oldest first. From the environment: TRIRANK_API_KEY,
// TRIRANK_CA, TRIRANK_CERT, TRIRANK_KEY (PEM files). Exit codes: 0 answered, or the fallback shown; 2 the
// request or the key is wrong.

import { Recommender } from "./recommender.js";

const [address, user = "", ...items] = process.argv.slice(2);
if (!address) {
  console.error("usage: node storefront.js HOST:PORT [USER [ITEM ...]]");
  process.exit(2);
}
const { TRIRANK_API_KEY, TRIRANK_CA, TRIRANK_CERT, TRIRANK_KEY } = process.env;
const recommender = new Recommender(address, {
  timeoutMs: 2000,
  apiKey: TRIRANK_API_KEY,
  ca: TRIRANK_CA,
  cert: TRIRANK_CERT,
  key: TRIRANK_KEY,
});
try {
  const history = items.map((item_id) => ({ item_id, event_type: "view" }));
  const page = await recommender.page({ user_id: user, history }, { fallback: ["bestseller-1", "bestseller-2"] });
  console.log(JSON.stringify(page));
} catch (error) {
  console.error(`${error.code}: ${error.details ?? error.message}`);
  process.exitCode = 2;
} finally {
  recommender.close();
}
