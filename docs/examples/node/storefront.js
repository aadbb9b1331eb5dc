// Ask for one page and print its ids as JSON, in this folder and with Node.js 18 or newer:
//
//   npm ci                                            once: gRPC for Node.js, as package-lock.json has it
//   node storefront.js HOST:PORT [USER [ITEM ...]]
//
// ITEM ... is what the visitor looked at just now, oldest first. From the environment:
//
//   TRIRANK_API_KEY               for a server with --api_keys
//   TRIRANK_CA                    PEM file of the server's authority, for a server with TLS (--tls_cert)
//   TRIRANK_CERT, TRIRANK_KEY     PEM files of our own, for one that wants to see a certificate (--tls_client_ca)
//
// Exit codes: 0 answered, or the fallback shown, as it is where a certificate is not trusted; 2 the request,
// the API key or one of the files is wrong, or the server failed in a way that nobody foresaw (INTERNAL).

import { Recommender } from "./recommender.js";

const [address, user = "", ...items] = process.argv.slice(2);
if (!address) {
  console.error("usage: node storefront.js HOST:PORT [USER [ITEM ...]]");
  process.exit(2);
}
const { TRIRANK_API_KEY, TRIRANK_CA, TRIRANK_CERT, TRIRANK_KEY } = process.env;
let recommender;
try {
  recommender = new Recommender(address, {
    timeoutMs: 2000,
    apiKey: TRIRANK_API_KEY,
    ca: TRIRANK_CA,
    cert: TRIRANK_CERT,
    key: TRIRANK_KEY,
  });
  const history = items.map((item_id) => ({ item_id, event_type: "view" }));
  const page = await recommender.page({ user_id: user, history }, { fallback: ["bestseller-1", "bestseller-2"] });
  console.log(JSON.stringify(page));
} catch (error) {
  console.error(`${error.code ?? error.name}: ${error.details ?? error.message}`);
  process.exitCode = 2;
} finally {
  recommender?.close();
}
