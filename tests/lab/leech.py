"""Gets what a torrent names with libtorrent, and ends: `leech.py TORRENT DIRECTORY ADDRESS`."""

import sys

import libtorrent

torrent, directory, address = sys.argv[1:4]
session = libtorrent.session(
    {
        "listen_interfaces": f"{address}:6882",
        "enable_dht": False,
        "enable_lsd": False,
        "enable_upnp": False,
        "enable_natpmp": False,
        "allow_multiple_connections_per_ip": True,
    }
)
added = session.add_torrent({"ti": libtorrent.torrent_info(torrent), "save_path": directory})
while not added.status().is_seeding:
    session.wait_for_alert(20)
    session.pop_alerts()
# All of it is on the disk before anybody looks.
added.flush_cache()
