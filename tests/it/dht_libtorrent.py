"""libtorrent's DHT nodes, driven by JSON lines: one request a line on stdin, one event a line on stdout.

Requests (hash, target and value in hexadecimal):
    {"op": "start", "node": 0, "listen": "127.0.0.2:0,[::1]:0"}  -> {"event": "started", "node": 0, "addresses": [...]}
    {"op": "add", "node": 0, "to": "127.0.0.3:9977"}
    {"op": "announce", "node": 0, "hash": ".."}      with the port it listens on; once for each hash
    {"op": "peers", "node": 0, "hash": ".."}                     -> {"event": "peers", "hash": "..", "peers": [...]}
    {"op": "put", "node": 0, "value": "text"}                    -> {"event": "put", "target": "..", "stored": 8}
    {"op": "get", "node": 0, "target": ".."}                     -> {"event": "item", "target": "..", "value": ".." or null} (bytes, in hexadecimal)
    {"op": "block", "node": 0, "limit": 5}          packets a second from one address before it is ignored
Without being asked: {"event": "announced", "hash": "..", "from": ".."} for an announce that a node took,
{"event": "blocked", "address": ".."} when it begins to ignore one, {"event": "packet", "in": true, "with": "..", "text": ".."}
after {"op": "trace", "node": 0}. Ends when stdin ends.
"""

import json
import os
import queue
import sys
import threading

import libtorrent as lt

SETTINGS = {
    "enable_dht": True,
    "dht_bootstrap_nodes": "",
    "enable_lsd": False,
    "enable_upnp": False,
    "enable_natpmp": False,
    "allow_multiple_connections_per_ip": True,
    # The defaults keep a network on one machine from forming: one node an address range, ids that fit the address.
    "dht_restrict_routing_ips": False,
    "dht_restrict_search_ips": False,
    "dht_prefer_verified_node_ids": False,
    "dht_enforce_node_id": False,
    "dht_ignore_dark_internet": False,
    "dht_upload_rate_limit": 1000000,
    "alert_mask": lt.alert.category_t.dht_notification
    | lt.alert.category_t.dht_operation_notification
    | lt.alert.category_t.dht_log_notification
    | lt.alert.category_t.status_notification
    | lt.alert.category_t.error_notification,
    "alert_queue_size": 100000,
}

events = queue.Queue()


def host_port(text):
    host, port = text.rsplit(":", 1)
    return host.strip("[]"), int(port)


def endpoint(pair):
    host, port = pair
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def tell(**event):
    print(json.dumps(event), flush=True)


class Node:
    def __init__(self, index, listen):
        self.index = index
        self.waits_for = len(listen.split(","))
        self.addresses = []
        self.trace = False
        self.session = lt.session({**SETTINGS, "listen_interfaces": listen})
        self.session.set_alert_notify(lambda: events.put(self))
        events.put(self)

    def announce(self, key):
        # As a torrent does it: 2.0's dht_announce cannot be called from Python.
        params = lt.add_torrent_params()
        params.info_hashes = lt.info_hash_t(key)
        params.save_path = "/nonexistent"
        params.flags &= ~(lt.torrent_flags.paused | lt.torrent_flags.auto_managed)
        self.session.add_torrent(params).force_dht_announce()

    def alerts(self):
        for alert in self.session.pop_alerts():
            kind = type(alert).__name__
            if kind == "listen_succeeded_alert" and "UTP" in str(alert.message()).upper():
                self.addresses.append(alert.message().split()[-1])
                if len(self.addresses) == self.waits_for:
                    tell(event="started", node=self.index, addresses=self.addresses)
            elif kind == "listen_failed_alert":
                tell(event="failed", node=self.index, text=alert.message())
            elif kind == "dht_get_peers_reply_alert":
                peers = [endpoint(peer) for peer in alert.peers()]
                tell(event="peers", node=self.index, hash=str(alert.info_hash), peers=peers)
            elif kind == "dht_announce_alert":
                address = str(alert.ip)
                tell(event="announced", node=self.index, hash=str(alert.info_hash), **{"from": endpoint((address, alert.port))})
            elif kind == "dht_put_alert":
                tell(event="put", node=self.index, target=str(alert.target), stored=alert.num_success)
            elif kind == "dht_immutable_item_alert":
                try:
                    value = alert.item
                except RuntimeError:  # 2.0 raises where nothing was found.
                    value = None
                if isinstance(value, dict):
                    value = value.get("value")
                tell(event="item", node=self.index, target=str(alert.target), value=value.hex() if isinstance(value, bytes) and value else None)
            elif kind == "dht_log_alert" and "BANNING" in alert.message().upper():
                tell(event="blocked", node=self.index, address=alert.message())
            elif kind == "dht_pkt_alert" and self.trace:
                text = alert.message()
                tell(event="packet", node=self.index, text=text)


def main():
    def read():
        for line in sys.stdin:
            events.put(json.loads(line))
        events.put(None)

    threading.Thread(target=read, daemon=True).start()
    nodes = {}
    while (event := events.get()) is not None:
        if isinstance(event, Node):
            event.alerts()
            continue
        op = event["op"]
        if op == "start":
            nodes[event["node"]] = Node(event["node"], event["listen"])
            continue
        node = nodes[event["node"]]
        session = node.session
        if op == "add":
            session.add_dht_node(host_port(event["to"]))
        elif op == "announce":
            node.announce(lt.sha1_hash(bytes.fromhex(event["hash"])))
        elif op == "peers":
            session.dht_get_peers(lt.sha1_hash(bytes.fromhex(event["hash"])))
        elif op == "put":
            session.dht_put_immutable_item(event["value"].encode())
        elif op == "get":
            session.dht_get_immutable_item(lt.sha1_hash(bytes.fromhex(event["target"])))
        elif op == "block":
            session.apply_settings({"dht_block_ratelimit": event["limit"]})
        elif op == "trace":
            node.trace = True
        else:
            tell(event="failed", text=f"unknown op {op}")
    # Without the DHT's good-byes, which may wait for nodes that are gone.
    sys.stdout.flush()
    os._exit(0)


main()
