/* A disk that is slow: delays chosen libc calls on the files below $SLOW_DISK_FOLDER.
 *
 * The script $SLOW_DISK_SCRIPT is read again at each call, so a test switches it while the program runs:
 * "open=300 sync=1000" are milliseconds for each open() and each fsync() or fdatasync(); also "rename" and "stat".
 * Without the file nothing is delayed. A file $SLOW_DISK_SCRIPT.once delays one call, and goes with it.
 * Each delayed call adds a letter to $SLOW_DISK_SCRIPT.calls, by which a test sees that the program can be delayed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static const char *folder, *script;

__attribute__((constructor)) static void read_environment(void) {
  folder = getenv("SLOW_DISK_FOLDER");
  script = getenv("SLOW_DISK_SCRIPT");
}

/* Milliseconds that this file gives the call. Only system calls of its own, so that nothing here is delayed itself. */
static long delay_in(const char *file, const char *call) {
  char text[256];
  int fd = (int)syscall(SYS_openat, AT_FDCWD, file, O_RDONLY | O_CLOEXEC, 0);
  if (fd < 0) return 0;
  long length = syscall(SYS_read, fd, text, sizeof text - 1);
  syscall(SYS_close, fd);
  if (length <= 0) return 0;
  text[length] = 0;
  size_t name = strlen(call);
  for (char *at = text; (at = strstr(at, call)); at += name)
    if (at[name] == '=') return atol(at + name + 1);
  return 0;
}

static void delay(const char *call, const char *path) {
  if (!folder || !script || !path || strncmp(path, folder, strlen(folder)) != 0) return;
  char name[PATH_MAX];
  long milliseconds = delay_in(script, call);
  snprintf(name, sizeof name, "%s.once", script);
  long once = delay_in(name, call);
  if (once > 0 && syscall(SYS_unlinkat, AT_FDCWD, name, 0) == 0) milliseconds = once;
  if (milliseconds <= 0) return;
  snprintf(name, sizeof name, "%s.calls", script);
  int fd = (int)syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd >= 0) {
    syscall(SYS_write, fd, call, 1);
    syscall(SYS_close, fd);
  }
  struct timespec left = {milliseconds / 1000, milliseconds % 1000 * 1000000};
  while (nanosleep(&left, &left) != 0 && errno == EINTR)
    ;
}

static void delay_of_fd(const char *call, int fd) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  long length = syscall(SYS_readlinkat, AT_FDCWD, link, path, sizeof path - 1);
  if (length <= 0) return;
  path[length] = 0;
  delay(call, path);
}

#define REAL(result, name, ...) \
  static result (*real)(__VA_ARGS__); \
  if (!real) real = (result(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static mode_t mode_of(int flags, va_list more) {
  return flags & (O_CREAT | __O_TMPFILE) ? va_arg(more, mode_t) : 0;
}

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    REAL(int, #name, const char *, int, ...); \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = mode_of(flags, more); \
    va_end(more); \
    delay("open", path); \
    return real(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int at, const char *path, int flags, ...) { \
    REAL(int, #name, int, const char *, int, ...); \
    va_list more; \
    va_start(more, flags); \
    mode_t mode = mode_of(flags, more); \
    va_end(more); \
    delay("open", path); \
    return real(at, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

int fsync(int fd) {
  REAL(int, "fsync", int);
  delay_of_fd("sync", fd);
  return real(fd);
}

int fdatasync(int fd) {
  REAL(int, "fdatasync", int);
  delay_of_fd("sync", fd);
  return real(fd);
}

int rename(const char *from, const char *to) {
  REAL(int, "rename", const char *, const char *);
  delay("rename", to);
  return real(from, to);
}

int statx(int at, const char *path, int flags, unsigned int mask, struct statx *found) {
  REAL(int, "statx", int, const char *, int, unsigned int, struct statx *);
  delay("stat", path);
  return real(at, path, flags, mask, found);
}
