// A client of Trirank made from the .proto alone, as a storefront would keep one for its whole life.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import grpc from "@grpc/grpc-js";
import protoLoader from "@grpc/proto-loader";

const protos = fileURLToPath(new URL("../../../protos/trirank/v1/", import.meta.url));
const definition = protoLoader.loadSync(`${protos}recommender.proto`, {
  keepCase: true,
  longs: Number,
  enums: String,
  defaults: true,
  oneofs: true,
});
const { RecommenderService } = grpc.loadPackageDefinition(definition).trirank.v1;

// What to do without: the page is shown with something else rather than late or not at all.
const TEMPORARY = new Set([
  grpc.status.UNAVAILABLE,
  grpc.status.DEADLINE_EXCEEDED,
  grpc.status.RESOURCE_EXHAUSTED,
  grpc.status.CANCELLED,
]);

export class Recommender {
  /**
   * @param {string} address "host:port", or "dns:///name:port" to spread requests over all its addresses.
   * @param {{timeoutMs?: number, apiKey?: string, ca?: string, cert?: string, key?: string}} options
   *   timeoutMs: how long the page can wait. apiKey: sent with every call. ca: PEM file of who signed the
   *   server's certificate, for TLS; cert and key: PEM files of our own, for mTLS.
   */
  constructor(address, { timeoutMs = 200, apiKey, ca, cert, key } = {}) {
    const read = (path) => (path ? readFileSync(path) : null);
    const credentials =
      ca || cert || key ? grpc.credentials.createSsl(read(ca), read(key), read(cert)) : grpc.credentials.createInsecure();
    this.timeoutMs = timeoutMs;
    this.apiKey = apiKey;
    this.client = new RecommenderService(address, credentials, {
      "grpc.service_config": readFileSync(`${protos}service_config.json`, "utf8"),
    });
  }

  /** Make a call: "Recommend", "SimilarItems", "Rank" or "RecordEvents"; rejects with grpc-js's ServiceError. */
  call(method, request) {
    const metadata = new grpc.Metadata();
    if (this.apiKey) metadata.set("x-api-key", this.apiKey);
    const deadline = Date.now() + this.timeoutMs;
    return new Promise((resolve, reject) => {
      this.client[method](request, metadata, { deadline }, (error, response) =>
        error ? reject(error) : resolve(response),
      );
    });
  }

  /**
   * The ids for a page, best first; `fallback` where the recommender cannot answer in time. All else is thrown:
   * a request that is wrong (INVALID_ARGUMENT, UNAUTHENTICATED, ...), which is a mistake in the storefront, and
   * a failure that nobody foresaw (INTERNAL, UNKNOWN), which waiting does not mend.
   */
  async page(visitor, { limit = 10, fallback = [], ...request } = {}) {
    try {
      const { items } = await this.call("Recommend", { visitor, limit, ...request });
      return items.map((item) => item.item_id);
    } catch (error) {
      if (!TEMPORARY.has(error.code)) throw error;
      console.error(`recommender: ${grpc.status[error.code]}, showing the fallback`);
      return fallback;
    }
  }

  close() {
    this.client.close();
  }
}
