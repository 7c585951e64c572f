/*
 * scenes.h - the operations of the DM layer, each in a situation made for it, for tests that stop one in its midst.
 *
 * There are two hosts on a device. `h` does the operation, and dies of it. `other` survives: it has a buffer, a Ref to frames
 * of its own, and frames that it shares with h. h holds Refs and mappings besides those that the operation is about.
 */
#ifndef DM_TEST_SCENES_H
#define DM_TEST_SCENES_H

#include "dm.h"

#define SCENE_FRAMES 96u
#define SCENE_REFS 24u
#define SCENE_DEAD 1u  /* h's id */
#define SCENE_OTHER 2u /* other's id */

#define SCENE_UFFD 1u /* needs userfaultfd */
#define SCENE_DATA 2u /* stores to frames matter, too: overflow frames are written */
#define SCENE_LONG 4u /* hundreds of stores */

struct scene {
    struct dm_device *dev;
    struct dm_host *h, *other;
    struct dm_ref_wire ref, out; /* the Ref that the operation is about, the Ref that it makes */
    uint32_t id;                 /* the mapping that it is about, or makes */
    struct dm_ref_wire others; /* a Ref of other's to the same frames, which goes in meanwhile() */
    uint32_t handed;           /* entry of a Ref that other does not keep, DM_NO_FRAME: none */
    uint32_t crowded;          /* a frame whose refcount was raised by hand, DM_NO_FRAME: none */
    uint32_t crowd;            /* by so much */
};

struct scenario {
    const char *name;
    unsigned flags; /* SCENE_* */
    int status;     /* what the operation returns */
    void (*prepare)(struct scene *s);
    int (*operate)(struct scene *s);
    void (*meanwhile)(struct scene *s); /* what other does in the midst of it, or NULL */
};

extern const struct scenario scenarios[];
extern const unsigned nr_scenarios;

/* A device for scenes: two hosts, nothing held by anybody. */
void scene_device(struct dm_device *dev);
/* Attach both hosts to it and let them do all that goes before the operation. */
void scene_prepare(struct scene *s, struct dm_device *dev, const struct scenario *what);

#endif
