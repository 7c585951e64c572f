"""Photographs that travel by reference: a client, a load balancer and workers, each a host of its own.

    client ──Ref──▶ balancer ──Ref──▶ worker
           ◀──Ref──          ◀──Ref──

The client places real photographs in DM and sends Refs of 40 bytes. The balancer passes them on to the less
loaded worker and never sees a pixel. A worker maps a Ref, counts a histogram, edits a band of the picture in
place, and sends a Ref to the result back. Only the pages of the band are copied, by copy-on-write; the
client's own picture stays as it was, which it checks, along with every result.

``scripts/run_fabric.sh`` or ``python -m examples.photos`` runs it. Map of the package:

    picture.py     the photographs, and what is done to them; knows nothing of DM
    messages.py    what is said between the three
    wire.py        how it is said: the one module that an RPC layer would replace
    worker.py, balancer.py, client.py
    report.py      the table at the end
"""
