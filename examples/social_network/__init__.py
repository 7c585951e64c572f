"""A social network: posts, timelines, followers. Most of its services only hand on what others have written.

                                                    ┌▶ compose-post ──▶ text ─▶ url-shorten, user-mention
                                                    │        │    └───▶ user, media, unique-id
    generator ─┐                                    │        ▼
               ├▶ load-balancer ─▶ proxy ─▶ php-fpm ┼▶ home-timeline ─┬─▶ post-storage
    HTTP ──────┘                                    ├▶ user-timeline ─┘
                                                    └▶ user, social-graph

The application is that of DeathStarBench, with its requests, its data and its HTTP paths; each service is a class with typed
methods, in a process of its own. Load balancer, proxy and php-fpm are Forwarders of the library, and the timelines hand on what the
storage has returned: by value, a list of posts is copied at every step; by reference it is written once, and read once, by who asked.

``python -m examples.social_network`` runs it: docs/social-network.md. Map of the package:

    records.py, text.py         posts, requests, replies; what is found in a text; know nothing of DM
    graph.py, data/             who follows whom
    stores.py                   where services keep things: memory, SQLite, Redis
    variants.py                 how lists of posts travel
    services.py, storage.py     what each service does: those that keep nothing, those that keep something
    roles.py, hosts.py          starting services, in any process; the processes, for the launcher
    web.py                      HTTP in front
    profiles.py, load.py        which requests are made; making them on schedule, and how long they take
    fill.py, checks.py          users, followers and posts to begin with; whether the application does what it is for
    session.py                  one run, with all variants in turn
"""
