"""Two kinds of clients that `nfold bench load` has not: HTTP with a connection for each request, and a gRPC stream. Runs in a
pod of deploy/check-cluster, from an image with Python and nothing else, hence its own few frames of HTTP/2:

    check_cluster_client.py fresh|stream HTTP_HOST:PORT GRPC_HOST:PORT RATE SECONDS MODEL PHOTOGRAPH

Prints a line of JSON: how the requests ended, by the names that `nfold bench load` has for it, and the slowest answer.
"""
import collections, concurrent.futures, http.client, json, pathlib, select, socket, struct, sys, threading, time

PATIENCE_S = 10
# `grpc-status` in HPACK's Huffman code, and the codes of digits
STATUS = bytes.fromhex("9acac8b21234da8f")
DIGITS = {**{format(i, "05b"): str(i) for i in range(3)}, **{format(0b011001 + i, "06b"): str(i + 3) for i in range(7)}}
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
UNAVAILABLE = 14


def address(text):
    host, port = text.rsplit(":", 1)
    return host.strip("[]"), int(port)


def of_http(status):
    named = {429: "refused", 503: "refused", 504: "deadline"}
    return "ok" if status < 300 else named.get(status, "client_error" if status < 500 else "server_error")


def of_grpc(status):
    named = {8: "refused", UNAVAILABLE: "refused", 4: "deadline"}
    return named.get(status, "client_error" if status in (3, 5, 6, 7, 9, 11, 12, 16) else "server_error")


class Record:
    def __init__(self):
        self.outcomes, self.slowest_s, self.moved = collections.Counter(), 0.0, 0

    def add(self, due, outcome):
        self.outcomes[outcome] += 1
        if outcome == "ok":
            self.slowest_s = max(self.slowest_s, time.monotonic() - due)

    def told(self):
        return {"outcomes": dict(self.outcomes), "slowest_ms": round(1e3 * self.slowest_s, 1), "moved": self.moved}


def due_times(rate, seconds):
    start = time.monotonic()
    for i in range(round(rate * seconds)):
        due = start + i / rate
        time.sleep(max(0, due - time.monotonic()))
        yield due


# a connection for each request


def fresh(where, rate, seconds, body):
    record, lock = Record(), threading.Lock()
    def one(due):
        connection = http.client.HTTPConnection(*where, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/v1/classify", body, {"content-type": "application/octet-stream", "connection": "close"})
            answer = connection.getresponse()
            answer.read()
            outcome = of_http(answer.status)
        except TimeoutError:
            outcome = "timeout"
        except (OSError, http.client.HTTPException):
            outcome = "transport"
        finally:
            connection.close()
        with lock:
            record.add(due, outcome)
    with concurrent.futures.ThreadPoolExecutor(max_workers=256) as pool:
        for call in [pool.submit(one, due) for due in due_times(rate, seconds)]:
            call.result()
    return record


# a gRPC stream, one message in flight


class Ended(Exception):
    """The stream is over: by a gRPC status, or by None where its connection broke."""

    def __init__(self, status):
        super().__init__(status)
        self.status = status


class Stream:
    def __init__(self, where):
        self.socket = socket.create_connection(where, timeout=PATIENCE_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.unread, self.messages = b"", b""
        self.window, self.stream_window, self.initial = 65535, 65535, 65535
        # no dynamic table, so that trailers can be read by themselves; as much as answers will ever take
        settings = struct.pack(">HIHI", 1, 0, 4, 2**31 - 1)
        host = f"[{where[0]}]" if ":" in where[0] else where[0]
        names = {":method": "POST", ":scheme": "http", ":path": "/inference.GRPCInferenceService/ModelStreamInfer",
                 ":authority": f"{host}:{where[1]}", "content-type": "application/grpc", "te": "trailers"}
        head = b"".join(b"\0" + bytes([len(k)]) + k.encode() + bytes([len(v)]) + v.encode() for k, v in names.items())
        self.socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self.frame(SETTINGS, 0, 0, settings)
                            + self.frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**30)) + self.frame(HEADERS, 4, 1, head))

    @staticmethod
    def frame(kind, flags, stream, payload):
        return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload

    def infer(self, message):
        """Sends a message and waits for its answer: whether it is one, and no error."""
        left = b"\0" + struct.pack(">I", len(message)) + message
        end = time.monotonic() + PATIENCE_S
        # what came meanwhile: a stream that has ended takes no more
        while select.select([self.socket], [], [], 0)[0]:
            self.read(end)
        while left:
            most = min(self.window, self.stream_window, 16384, len(left))
            if most <= 0:
                self.read(end)
                continue
            self.socket.sendall(self.frame(DATA, 0, 1, left[:most]))
            self.window, self.stream_window, left = self.window - most, self.stream_window - most, left[most:]
        while True:
            size = struct.unpack(">I", self.messages[1:5])[0] if len(self.messages) >= 5 else None
            if size is not None and len(self.messages) >= 5 + size:
                answer, self.messages = self.messages[5:5 + size], self.messages[5 + size:]
                # field 2 is the answer, field 1 an error's text
                return answer[:1] == b"\x12"
            self.read(end)

    def read(self, end):
        """One frame."""
        head = self.take(9, end)
        size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        payload = self.take(size, end)
        if kind == DATA:
            self.messages += payload
        elif kind == HEADERS and flags & 1:
            raise Ended(status_of(payload))
        elif kind == RST_STREAM:
            raise Ended(None)
        elif kind == SETTINGS and not flags & 1:
            for at in range(0, size, 6):
                name, value = struct.unpack(">HI", payload[at:at + 6])
                if name == 4:
                    self.stream_window, self.initial = self.stream_window + value - self.initial, value
            self.socket.sendall(self.frame(SETTINGS, 1, 0, b""))
        elif kind == PING and not flags & 1:
            self.socket.sendall(self.frame(PING, 1, 0, payload))
        elif kind == WINDOW_UPDATE:
            more = struct.unpack(">I", payload)[0]
            if int.from_bytes(head[5:9], "big"):
                self.stream_window += more
            else:
                self.window += more

    def take(self, size, end):
        while len(self.unread) < size:
            self.socket.settimeout(max(0.001, end - time.monotonic()))
            more = self.socket.recv(65536)
            if not more:
                raise Ended(None)
            self.unread += more
        taken, self.unread = self.unread[:size], self.unread[size:]
        return taken


def status_of(block):
    """grpc-status of a block of trailers that refers to no dynamic table."""
    for name in (b"grpc-status", STATUS):
        at = block.find(name)
        if at >= 0:
            size = block[at + len(name)]
            value = block[at + len(name) + 1:][:size & 127]
            if not size & 128:
                return int(value)
            bits, digits = "".join(format(byte, "08b") for byte in value), ""
            while bits and not set(bits) == {"1"}:
                length = 5 if bits[:5] in DIGITS else 6
                digits, bits = digits + DIGITS[bits[:length]], bits[length:]
            return int(digits)
    return None


def varint(number):
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def field(number, value):
    return varint(number << 3 | 2) + varint(len(value)) + value


def tensor(where, model):
    """A ModelInferRequest with pixels as the model's metadata asks for them."""
    connection = http.client.HTTPConnection(*where, timeout=PATIENCE_S)
    connection.request("GET", f"/v2/models/{model}")
    taken = json.loads(connection.getresponse().read())["inputs"][0]
    _, channels, height, width = taken["shape"]
    shape = b"".join(varint(side) for side in (1, height, width, channels))
    described = field(1, taken["name"].encode()) + field(2, b"UINT8") + field(3, shape)
    pixels = bytes(i * 7 % 251 for i in range(height * width * channels))
    return field(1, model.encode()) + field(5, described) + field(7, pixels)


def stream(where, rate, seconds, message):
    record, open_stream = Record(), None
    for due in due_times(rate, seconds):
        for attempt in range(4):
            idle = open_stream is not None
            try:
                open_stream = open_stream or Stream(where)
                outcome = "ok" if open_stream.infer(message) else "server_error"
            except Ended as ended:
                open_stream, outcome = None, "transport" if ended.status is None else of_grpc(ended.status)
                # UNAVAILABLE says that the message was not taken
                if ended.status == UNAVAILABLE and idle and attempt < 3:
                    record.moved += 1
                    continue
            except TimeoutError:
                open_stream, outcome = None, "timeout"
            except OSError:
                open_stream, outcome = None, "transport"
            break
        record.add(due, outcome)
    return record


def main():
    kind, http_address, grpc_address, rate, seconds, model, photograph = sys.argv[1:]
    if kind == "fresh":
        record = fresh(address(http_address), float(rate), float(seconds), pathlib.Path(photograph).read_bytes())
    else:
        record = stream(address(grpc_address), float(rate), float(seconds), tensor(address(http_address), model))
    print(json.dumps(record.told()))


if __name__ == "__main__":
    main()
