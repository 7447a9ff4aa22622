// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Counts the instructions that a guest executes, for `cargo xtask bench guest`.
 *
 * QEMU loads it with
 *
 *     -plugin count.so,socket=PATH[,exact=on][,profile=on]
 *
 * and it connects to the Unix socket PATH, where somebody must be listening
 * already.  What comes in over the socket are questions, one word on a line:
 *
 *     total      is answered with one line: instructions executed so far
 *     profile    is answered with a line "ADDRESS INSTRUCTIONS" for each
 *                block of code that was executed, and an empty line
 *
 * So the one who asks decides which stretch of the guest's life is counted:
 * it is the difference of two answers, and booting is in neither.  Nothing is
 * needed in the guest, and nothing is written when nobody asks.
 *
 * How it counts.  QEMU translates code in blocks that have one entrance; the
 * plugin has each block begin with an addition of its length to a counter of
 * the virtual processor's own (QEMU calls that a scoreboard).  The addition is
 * part of the translated code, there is no call and no lock.  A block that is
 * left in the middle, by a page fault for instance, is counted as a whole;
 * with exact=on each instruction has an addition of its own instead, which
 * costs more time and shows how little that makes.
 *
 * A string instruction with a prefix to repeat it (`rep movsb`) counts as one
 * instruction, however much it copies: so does a processor's own counter.
 */

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <qemu-plugin.h>

QEMU_PLUGIN_EXPORT int qemu_plugin_version = QEMU_PLUGIN_VERSION;

/* What was asked for on the command line. */
static bool exact;
static bool profile;

/* Instructions of each virtual processor. */
static qemu_plugin_u64 total;

/*
 * With profile=on: a counter for each address at which a block begins.  The
 * table only grows; a block that is translated again finds its counter there.
 */
static GHashTable *blocks;
static GMutex blocks_lock;

typedef struct {
    uint64_t address;
    qemu_plugin_u64 count;
} Block;

static qemu_plugin_u64 new_counter(void)
{
    return qemu_plugin_scoreboard_u64(
        qemu_plugin_scoreboard_new(sizeof(uint64_t)));
}

static Block *block_at(uint64_t address)
{
    Block *block;

    g_mutex_lock(&blocks_lock);
    block = g_hash_table_lookup(blocks, &address);
    if (!block) {
        block = g_new0(Block, 1);
        block->address = address;
        block->count = new_counter();
        g_hash_table_insert(blocks, &block->address, block);
    }
    g_mutex_unlock(&blocks_lock);
    return block;
}

/* QEMU has translated a block: the moment to add what counts it. */
static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    size_t length = qemu_plugin_tb_n_insns(tb);

    (void)id;
    if (exact) {
        for (size_t i = 0; i < length; i++) {
            qemu_plugin_register_vcpu_insn_exec_inline_per_vcpu(
                qemu_plugin_tb_get_insn(tb, i), QEMU_PLUGIN_INLINE_ADD_U64,
                total, 1);
        }
    } else {
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
            tb, QEMU_PLUGIN_INLINE_ADD_U64, total, length);
    }
    if (profile) {
        Block *block = block_at(qemu_plugin_tb_vaddr(tb));

        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
            tb, QEMU_PLUGIN_INLINE_ADD_U64, block->count, length);
    }
}

/*
 * The sums are read while processors run: each counter is written by one
 * thread in whole words, so what is read is what it was a moment ago.  Who
 * wants an exact difference asks while the guest is idle.
 */
static void answer_total(FILE *line)
{
    fprintf(line, "%" PRIu64 "\n", qemu_plugin_u64_sum(total));
}

static void answer_profile(FILE *line)
{
    GHashTableIter iter;
    gpointer value;

    if (profile) {
        g_mutex_lock(&blocks_lock);
        g_hash_table_iter_init(&iter, blocks);
        while (g_hash_table_iter_next(&iter, NULL, &value)) {
            Block *block = value;
            uint64_t count = qemu_plugin_u64_sum(block->count);

            if (count) {
                fprintf(line, "%" PRIx64 " %" PRIu64 "\n", block->address,
                        count);
            }
        }
        g_mutex_unlock(&blocks_lock);
    }
    fputc('\n', line);
}

/* A thread of its own answers, so that no processor ever waits for it. */
static void *answer_questions(void *argument)
{
    int fd = GPOINTER_TO_INT(argument);
    FILE *questions = fdopen(fd, "r");
    FILE *answers = fdopen(dup(fd), "w");
    char question[32];

    if (!questions || !answers) {
        fprintf(stderr, "count: cannot use the socket: %s\n", strerror(errno));
        return NULL;
    }
    while (fgets(question, sizeof(question), questions)) {
        if (!strcmp(question, "total\n")) {
            answer_total(answers);
        } else if (!strcmp(question, "profile\n")) {
            answer_profile(answers);
        } else {
            fprintf(answers, "what?\n");
        }
        fflush(answers);
    }
    fclose(questions);
    fclose(answers);
    return NULL;
}

static int connect_to(const char *path)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    int fd;

    if (strlen(path) >= sizeof(address.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd >= 0 && connect(fd, (struct sockaddr *)&address, sizeof(address))) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* Signals are QEMU's business: the thread is started with all of them blocked. */
static int start_thread(int fd)
{
    sigset_t all, before;
    pthread_t thread;
    int error;

    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, NULL, answer_questions,
                           GINT_TO_POINTER(fd));
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!error) {
        pthread_detach(thread);
    }
    return error;
}

QEMU_PLUGIN_EXPORT int qemu_plugin_install(qemu_plugin_id_t id,
                                           const qemu_info_t *info,
                                           int argc, char **argv)
{
    const char *path = NULL;
    int fd;

    (void)info;
    for (int i = 0; i < argc; i++) {
        char *value = strchr(argv[i], '=');
        size_t name = value ? (size_t)(value - argv[i]) : strlen(argv[i]);
        bool known = true;

        if (value && name == 6 && !strncmp(argv[i], "socket", name)) {
            path = value + 1;
        } else if (value && name == 5 && !strncmp(argv[i], "exact", name)) {
            known = qemu_plugin_bool_parse("exact", value + 1, &exact);
        } else if (value && name == 7 && !strncmp(argv[i], "profile", name)) {
            known = qemu_plugin_bool_parse("profile", value + 1, &profile);
        } else {
            known = false;
        }
        if (!known) {
            fprintf(stderr, "count: what is %s?\n", argv[i]);
            return -1;
        }
    }
    if (!path) {
        fprintf(stderr, "count: socket=PATH is needed\n");
        return -1;
    }
    fd = connect_to(path);
    if (fd < 0) {
        fprintf(stderr, "count: cannot connect to %s: %s\n", path,
                strerror(errno));
        return -1;
    }
    total = new_counter();
    blocks = g_hash_table_new(g_int64_hash, g_int64_equal);
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    if (start_thread(fd)) {
        fprintf(stderr, "count: cannot start a thread\n");
        return -1;
    }
    return 0;
}
