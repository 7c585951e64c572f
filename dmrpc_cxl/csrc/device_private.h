/* device_private.h - what device.c, device_tables.c and audit.c share and nobody else needs. */
#ifndef DM_DEVICE_PRIVATE_H
#define DM_DEVICE_PRIVATE_H

#include "device.h"

int dm_device_fail(struct dm_error *err, int status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
int dm_device_fail_sys(struct dm_error *err, const char *syscall, const char *text);
int dm_device_check_frames(const struct dm_device *dev, uint64_t first, uint64_t nr,
                           struct dm_error *err);
int dm_device_check_writable(const struct dm_device *dev, struct dm_error *err);
int dm_device_allocate(int fd, uint64_t off, uint64_t bytes, const char *what,
                       struct dm_error *err);
int dm_device_punch(int fd, uint64_t off, uint64_t bytes, struct dm_error *err);

#endif
