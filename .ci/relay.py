"""A bare relay, to compare the proxy with: what any proxy of http.server and http.client costs.

    python .ci/relay.py UPSTREAM_PORT    # takes a free port; the first line on stderr says which

It passes lines on as they are.
"""
import http.client
import http.server
import sys


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        upstream = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]))
        upstream.request("POST", self.path, body, {"Content-Type": "application/json"})
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in upstream.getresponse():
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")
        upstream.close()


http.server.ThreadingHTTPServer.request_queue_size = 128
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(f"listens on http://127.0.0.1:{server.server_port}", file=sys.stderr, flush=True)
server.serve_forever()
