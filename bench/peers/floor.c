/* floor.c: what the kernel alone costs, a bare loop of send() to every socket.
 *
 *   floor PORT
 *
 * A connection whose first bytes are "FEED\n" publishes: whatever is read from it goes to all streams as it is, in one
 * send() each. Every other connection is a stream. Nothing is parsed, queued or checked, so no server can do less.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_STREAMS = 20000, MAX_EVENTS = 256 };

static const char head[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
static int streams[MAX_STREAMS], stream_count, feed = -1;
static char bytes[256 * 1024];

static void send_to_all(ssize_t length) {
    for (int i = 0; i < stream_count; i++) {
        if (send(streams[i], bytes, (size_t)length, MSG_NOSIGNAL | MSG_DONTWAIT) == length) continue;
        close(streams[i]); /* gone, or not reading: the last stream takes its place */
        streams[i--] = streams[--stream_count];
    }
}

static void greet(int poller, int fd, ssize_t length) {
    if (length >= 5 && !memcmp(bytes, "FEED\n", 5)) {
        feed = fd;
        return;
    }
    epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL);
    if (length <= 0 || stream_count == MAX_STREAMS || send(fd, head, sizeof head - 1, MSG_NOSIGNAL) < 0) close(fd);
    else streams[stream_count++] = fd;
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((unsigned short)atoi(argc > 1 ? argv[1] : ""))};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int one = 1, poller = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) < 0 || listen(listener, 4096) < 0) {
        perror("floor");
        return 1;
    }
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[MAX_EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int n = epoll_wait(poller, events, MAX_EVENTS, -1);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                event.data.fd = accept(listener, NULL, NULL);
                if (event.data.fd < 0) continue;
                setsockopt(event.data.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                epoll_ctl(poller, EPOLL_CTL_ADD, event.data.fd, &event);
                continue;
            }
            ssize_t length = read(fd, bytes, sizeof bytes);
            if (fd != feed) {
                greet(poller, fd, length);
            } else if (length > 0) {
                send_to_all(length);
            } else {
                close(feed);
                feed = -1;
            }
        }
    }
}
