"""The coordinator: the service that owns a fabric's free frames and knows its hosts.

It keeps nothing that it cannot build again from the device, so it may be killed and started at any
    time: hosts that have
free frames do not notice, others wait for it. docs/coordinator-protocol.md describes the
conversation.

Map of the package, from pure to not; each module imports only from those above it::

    extents.py      a set of frames as runs                            pure
    ledger.py       pool, host slots, watermarks, statistics           pure
    names.py        the name service                                   pure
    directory.py    names, kept in the device
    messages.py     what the messages of csrc/wire.h carry             pure
    protocol.py     bytes to messages, who may say what when           pure
    refusals.py     statuses and exceptions                            pure
    processes.py    pidfds
    connection.py   one accepted socket
    waits.py        waiting for a change
    frames.py       ledger and frame words, kept in step
    hosts.py        registration, guards, death, reclaim
    supply.py       grants, recalls
    scrubber.py     accounting for every frame, in slices
    service.py      one method for each type of request
    listening.py    sockets to listen on
    server.py       taking over a device, accepting, stopping
    client.py       a synchronous client for tools and tests
    __main__.py     ``python -m dmrpc_cxl.coordinator FABRIC``

Paper: V-B. Differs: watermarks and batches have values and are negotiated; frames can be recalled;
hosts that die are noticed and reclaimed; the coordinator can be restarted; it keeps service names.
"""
