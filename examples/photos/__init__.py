"""Photographs that are edited elsewhere: a client, a load balancer and workers, each a host of its own.

    client ──call──▶ balancer ──call──▶ worker
           ◀─reply──          ◀─reply──

The client has real photographs in DM and calls PhotoService.edit, first by value, then by reference, always over the same
processes. By value the pixels travel in the messages. By reference a message has a Ref of 40 bytes; the balancer passes it
on to the least loaded worker and never sees a pixel; the worker counts a histogram, edits a band of the picture in place,
and returns it. Only the pages of the band are copied, by copy-on-write; the client's own picture stays as it was, which it
checks, along with every result.

``python -m examples.photos`` runs it. Map of the package:

    picture.py                        the photographs, and what is done to them; knows nothing of DM
    service.py                        what the three say to each other: plain classes
    worker.py, balancer.py, client.py
    report.py                         the table at the end
"""
