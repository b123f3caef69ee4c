"""`doctor --hostfile` on two nodes, each a network namespace with its own address."""

import json
import sys

from network import ADDRESSES, NOBODY, two_nodes, write_hosts
from places import ROOT

DOCTOR = (sys.executable, ROOT / "tools" / "doctor.py", "--json")


def findings(nodes, folder, names) -> tuple[int, list[dict]]:
    hosts = write_hosts(folder, names)
    with (folder / "said").open("w") as said:
        code = nodes.start(0, *DOCTOR, "--hostfile", hosts, "--folder", folder, said=said, cwd=folder).wait(500)
    said = (folder / "said").read_text()
    return code, [each for each in json.loads(said)["findings"] if each["what"] in ("ssh", "pdsh", "ranks", "gloo")]


def test_ranks_on_both_nodes_add_up_over_their_network(tmp_path):
    with two_nodes(tmp_path) as nodes:
        before = nodes.received(1)
        code, found = findings(nodes, tmp_path, ADDRESSES)
        assert (code, [each["state"] for each in found]) == (0, ["ok"] * 3), found
        assert nodes.received(1) - before > 5 * 2**24  # every sum came over the cable
    assert found[-1]["what"] == "gloo" and "2 ranks on" in found[-1]["said"]


def test_a_node_that_ssh_does_not_reach_is_named_and_no_rank_is_started(tmp_path):
    with two_nodes(tmp_path) as nodes:
        code, found = findings(nodes, tmp_path, [ADDRESSES[0], NOBODY])
    assert code == 1
    assert [(each["what"], each["state"]) for each in found] == [("ssh", "ok"), ("ssh", "missing")]
    assert NOBODY in found[1]["said"] and "No route to host" in found[1]["said"] and "ssh-copy-id" in found[1]["way"]
