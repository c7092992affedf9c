"""Seeds one file with libtorrent, and tells peers of each other: `seed.py FILE TORRENT ADDRESS PORT TRACKER [SEED...]`.

The first seed is the tracker too (BEP 3, compact answers of BEP 23), and knows the others from its arguments, as ADDRESS:PORT.
Writes TORRENT, says "ready", and seeds until it is killed.
"""

import http.server
import os
import struct
import sys
import threading
import time

import libtorrent

path, torrent, address, port, tracker = sys.argv[1:6]
seeds = [seed.rsplit(":", 1) for seed in sys.argv[6:]]


class Tracker(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        peers = b"".join(bytes(map(int, host.split("."))) + struct.pack(">H", int(port)) for host, port in seeds)
        body = b"d8:intervali60e5:peers%d:%be" % (len(peers), peers)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


if seeds:
    host, tracker_port = tracker.rsplit(":", 1)
    server = http.server.ThreadingHTTPServer((host, int(tracker_port)), Tracker)
    threading.Thread(target=server.serve_forever, daemon=True).start()

files = libtorrent.file_storage()
libtorrent.add_files(files, path)
made = libtorrent.create_torrent(files)
made.add_tracker(f"http://{tracker}/announce")
libtorrent.set_piece_hashes(made, os.path.dirname(path))
encoded = libtorrent.bencode(made.generate())
with open(torrent, "wb") as out:
    out.write(encoded)

session = libtorrent.session(
    {
        "listen_interfaces": f"{address}:{port}",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "allow_multiple_connections_per_ip": True,
    }
)
added = session.add_torrent(
    {
        "ti": libtorrent.torrent_info(torrent),
        "save_path": os.path.dirname(path),
        "flags": libtorrent.torrent_flags.seed_mode,
    }
)
while not added.status().is_seeding:
    session.wait_for_alert(100)
print("ready", flush=True)
while True:
    time.sleep(3600)
